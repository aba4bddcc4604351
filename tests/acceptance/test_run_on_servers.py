"""The whole way over the wire: MongoDB in, Cloud Storage out, a receiver told; 24 prompts, 5 of them bad."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
import requests
from PIL import Image
from pymongo import MongoClient

from tests.acceptance import product
from tests.acceptance.scenes import BAD, GOOD
from text2img.demo.judge import judge
from text2img.images.provenance import State, inspect

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def outcome(mongodb_server, gcs_server, tmp_path_factory):
    """A run over the 24 prompts and a second one after it, with all that they left behind."""
    from pytest_httpserver import HTTPServer

    folder = tmp_path_factory.mktemp("acceptance")
    uri = f"{mongodb_server}/acceptance"
    with MongoClient(uri, uuidRepresentation="standard", tz_aware=True) as client, HTTPServer() as receiver:
        database = client.get_default_database()
        database.datasets.insert_many([good.document for good in GOOD] + [bad for bad, _, _ in BAD])
        database.model_configs.insert_one(
            {"_id": "demo", "model_type": "stable_diffusion", "model_path": str(product.MODEL)}
        )
        receiver.expect_request("/told", method="POST").respond_with_data("")

        def job():
            return product.run(
                "--mongo-uri", uri,
                "--gcs-bucket", gcs_server.bucket,
                "--callback-url", receiver.url_for("/told?key=hush-hush"),
                "--num-inference-steps", "10", "--guidance-scale", "3",
                "--batch-size", "4",
                "--run-id", "night",
                "--log-file", str(folder / "run.log"),
                folder=folder,
                STORAGE_EMULATOR_HOST=gcs_server.host,
                INTERNAL_API_TOKEN="hush-token",
            )  # fmt: skip

        yield SimpleNamespace(
            first=job(),
            second=job(),
            documents={_key(document["_id"]): document for document in database.datasets.find()},
            results=list(database.dataset_records.find()),
            runs=list(database.runs.find()),
            told=[request for request, _ in receiver.log],
            bucket=f"{gcs_server.host}/{gcs_server.bucket}/generated",
            log_file=(folder / "run.log").read_text(),
        )


def _key(value):
    return (type(value).__name__, str(value))


def test_exit_status_says_that_some_failed(outcome):
    """The run ends with status 3 (done, some in error) and one line of result on standard output."""
    assert outcome.first.returncode == 3, outcome.first.stderr
    assert len(outcome.first.stdout.splitlines()) == 1
    assert outcome.first.stdout.startswith("completed 19, failed 5, remaining 0")


@pytest.mark.parametrize("good", GOOD, ids=lambda good: str(good.id))
def test_every_good_prompt_has_the_picture_it_asked_for(outcome, good):
    """A good prompt's picture lies in the bucket under its name and shows its own colours, not another's."""
    document = outcome.documents[_key(good.id)]
    assert document["status"] == "completed"
    name = document["image_url"].rpartition("/")[2]
    if good.name is not None:
        assert name == f"{good.name}.png"
    answer = requests.get(f"{outcome.bucket}/{name}", timeout=10)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    with Image.open(io.BytesIO(answer.content)) as image:
        seen = judge(image)
        parameters = json.loads(image.text["parameters"])
    assert (seen.colour, seen.background) == (good.scene.colour, good.scene.background)
    assert inspect(answer.content).state is State.UNSIGNED
    assert parameters["prompt"] == good.scene.caption
    assert parameters["seed"] == document["used"]["seed"]


@pytest.mark.parametrize("good", GOOD, ids=lambda good: str(good.id))
def test_every_good_prompt_is_recorded(outcome, good):
    """A completed prompt keeps its owner's fields, loses the claim's, and has exactly one full result."""
    document = outcome.documents[_key(good.id)]
    assert good.fields.items() - {("status", "pending")} <= document.items() if _flat(good) else True
    assert not {"claimed_by", "lease_expires_at"} & document.keys()
    assert len(document["sha256"]) == 64
    assert document["run_id"] == "night"
    used = {
        "seed",
        "num_inference_steps",
        "guidance_scale",
        "width",
        "height",
        "scheduler",
        "negative_prompt",
    }
    assert document["used"].keys() == used | {"model"}
    (result,) = [r for r in outcome.results if _key(r["dataset_id"]) == _key(good.id)]
    assert (result["status"], result["prompt"]) == ("completed", good.scene.caption)
    assert result["image_url"] == result["gcs_url"] == document["image_url"]
    assert result["prompt_truncated"] is False


def _flat(good):
    return not any(isinstance(value, dict) for value in good.fields.values())


@pytest.mark.parametrize(("bad", "code", "word"), BAD, ids=lambda value: str(value)[:40])
def test_every_bad_prompt_says_why(outcome, bad, code, word):
    """A bad prompt ends in ``error`` with its code and a sentence that names the field."""
    document = outcome.documents[_key(bad["_id"])]
    assert (document["status"], document["error_code"]) == ("error", code)
    assert word in document["error"]
    assert document["error_at"]


def test_the_receiver_is_told_once_of_each(outcome):
    """One POST, with the token, names every prompt once: results with their URL, errors with their code."""
    (request,) = outcome.told
    assert request.headers["Authorization"] == "Bearer hush-token"
    assert request.headers["webhook-id"].startswith("msg_")
    body = request.get_json()
    assert (body["run_id"], body["status"], body["final"]) == ("night", "completed", True)
    assert body["counts"] == {"completed": 19, "error": 5}
    assert sorted(r["prompt_id"] for r in body["results"]) == sorted(
        str(good.id) if not hasattr(good.id, "tzinfo") else _told_date(body) for good in GOOD
    )
    assert sorted(e["error_code"] for e in body["errors"]) == sorted(code for _, code, _ in BAD)


def _told_date(body):
    return next(r["prompt_id"] for r in body["results"] if "date" in r["prompt_id"])


def test_the_run_is_kept(outcome):
    """The run's document has counts, pace, seconds by stage, which fit into the run, and versions."""
    (run,) = outcome.runs
    assert (run["_id"], run["status"]) == ("night", "completed")
    assert (run["completed"], run["failed"]) == (19, 5)
    assert run["images_per_second"] > 0
    assert 0 < run["device_busy"] <= 1
    assert {"claim", "load", "denoise", "decode", "upload", "record"} <= run["seconds"].keys()
    assert all(run["seconds"][stage] > 0 for stage in ("load", "denoise", "decode"))
    of_the_device = sum(run["seconds"][stage] for stage in ("load", "compile", "denoise", "decode", "wait"))
    assert of_the_device <= (run["finished_at"] - run["started_at"]).total_seconds() + 0.1
    assert "torch" in run["versions"]


def test_the_second_run_does_nothing(outcome):
    """Run again, the job finds nothing to do and ends with status 0."""
    assert outcome.second.returncode == 0, outcome.second.stderr
    assert outcome.second.stdout.startswith("completed 0, failed 0, remaining 0")


def test_logs_are_json_lines_without_secrets(outcome):
    """Off a terminal every log line is a JSON object with a severity, and no secret is in any of it."""
    for line in outcome.first.stderr.splitlines():
        assert {"severity", "message"} <= json.loads(line).keys()
    everything = outcome.first.stdout + outcome.first.stderr + outcome.log_file
    assert "hush" not in everything
