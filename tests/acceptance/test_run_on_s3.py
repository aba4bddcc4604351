"""The whole way to S3: prompts from a file, pictures in a bucket, for accounts and services of every kind."""

from __future__ import annotations

import io
import json
import re
import sqlite3
from contextlib import closing
from types import SimpleNamespace

import pytest
import requests
from PIL import Image
from werkzeug import Response

from tests.acceptance import product
from tests.acceptance.product import sleeping
from tests.acceptance.scenes import GOOD
from tests.servers.s3 import client
from text2img.demo.judge import judge
from text2img.images.provenance import State, inspect

DATABASE = ("--database", "sqlite:///prompts.db")
MODEL = ("--model-id", str(product.MODEL), "--num-inference-steps", "10", "--guidance-scale", "3")
SCENES = [one for one in GOOD if isinstance(one.id, str)][:3]
SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAHUSH4711",
    "AWS_SECRET_ACCESS_KEY": "hush/secret+4711",
    "AWS_SESSION_TOKEN": "hush-session-4711",
}


@pytest.fixture
def job(tmp_path, s3_server):
    """Three prompts; a function that runs the product on them, with what it left behind."""
    (tmp_path / "prompts.json").write_text(
        json.dumps([{"id": one.id, "text": one.scene.caption} for one in SCENES])
    )
    assert product.run("enqueue", *DATABASE, "prompts.json", folder=tmp_path).returncode == 0

    def run(*arguments, **variables):
        variables = s3_server.variables | variables
        return sleeping.run(*arguments, *DATABASE, *MODEL, folder=tmp_path, **variables)

    bucket = client(s3_server)
    yield SimpleNamespace(run=run, rows=lambda table: _rows(tmp_path, table), folder=tmp_path)
    for each in bucket.list_objects_v2(Bucket=s3_server.bucket).get("Contents", []):
        bucket.delete_object(Bucket=s3_server.bucket, Key=each["Key"])


def _rows(folder, table):
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute(f"SELECT * FROM {table} ORDER BY rowid")]  # noqa: S608


def _shows(data, good):
    assert inspect(data).state is State.UNSIGNED
    with Image.open(io.BytesIO(data)) as image:
        seen = judge(image)
    return (seen.colour, seen.background) == (good.scene.colour, good.scene.background)


@pytest.mark.smoke
def test_pictures_go_to_the_bucket(job, s3_server):
    """``--s3-bucket``: each picture under generated/, a PNG in its own colours, recorded by its s3:// URL."""
    finished = job.run("run", "--s3-bucket", s3_server.bucket)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("completed 3, failed 0, remaining 0")
    assert finished.stdout.rstrip().endswith("s3://pictures/generated")
    bucket = client(s3_server)
    for one, row in zip(SCENES, job.rows("datasets"), strict=True):
        found = bucket.get_object(Bucket=s3_server.bucket, Key=f"generated/{one.name}.png")
        assert found["ContentType"] == "image/png"
        assert _shows(found["Body"].read(), one)
        assert row["image_url"] == f"s3://pictures/generated/{one.name}.png"
    for result in job.rows("dataset_records"):
        assert result["image_url"].startswith("s3://pictures/generated/")
        assert result["gcs_url"] is None


def test_public_pictures_are_found_by_their_url(job, s3_server):
    """``--acl public-read --public-urls``: image_url is where anybody finds the picture, without keys."""
    output = f"s3://{s3_server.bucket}/für alle"
    endpoint = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}  # the flag must beat it
    options = ("--acl", "public-read", "--public-urls", "--s3-endpoint", s3_server.endpoint)
    finished = job.run("run", "--output", output, *options, **endpoint)
    assert finished.returncode == 0, finished.stderr
    for one, row in zip(SCENES, job.rows("datasets"), strict=True):
        assert row["image_url"] == f"{s3_server.endpoint}/pictures/f%C3%BCr%20alle/{one.name}.png"
        assert _shows(requests.get(row["image_url"], timeout=10).content, one)


def test_an_account_that_may_only_write_is_enough(job, s3_server, httpserver):
    """403 to every look and listing: the run completes by creating alone."""

    def write_only(request):
        if request.method != "PUT":
            return Response("", status=403)
        wanted = {name: value for name, value in request.headers.items() if name.lower() != "host"}
        url = f"{s3_server.endpoint}{request.path}"
        answer = requests.put(url, data=request.get_data(), headers=wanted, timeout=30)
        return Response(
            answer.content, status=answer.status_code, headers={"ETag": answer.headers.get("ETag", "")}
        )

    httpserver.expect_request("/pictures").respond_with_handler(write_only)
    for one in SCENES:
        httpserver.expect_request(f"/pictures/generated/{one.name}.png").respond_with_handler(write_only)
    endpoint = httpserver.url_for("").rstrip("/")
    finished = job.run("run", "--s3-bucket", s3_server.bucket, "--s3-endpoint", endpoint)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("completed 3, failed 0, remaining 0")
    assert not [
        request for request, _ in httpserver.log if request.method == "GET" and "generated" in request.path
    ]
    assert all(
        request.headers.get("If-None-Match") == "*"
        for request, _ in httpserver.log
        if request.method == "PUT"
    )


def test_a_bucket_that_is_not_there_is_named(job):
    """Status 2, one line, nothing claimed."""
    finished = job.run("run", "--s3-bucket", "nowhere-to-be-seen")
    assert finished.returncode == 2
    assert (
        "the bucket nowhere-to-be-seen does not exist" in json.loads(product.errors(finished)[-1])["message"]
    )
    assert all(row["status"] == "pending" for row in job.rows("datasets"))


def test_doctor_writes_and_deletes(job, s3_server):
    """``doctor`` finds the bucket usable and leaves nothing in it."""
    finished = job.run("doctor", "--s3-bucket", s3_server.bucket)
    assert "s3://pictures/generated is writable" in finished.stdout
    assert "Contents" not in client(s3_server).list_objects_v2(Bucket=s3_server.bucket)


def test_no_key_is_said(job, s3_server):
    """Dry run, run and doctor at DEBUG, with a server and without: no key, secret or token in any line."""
    loud = ("--log-level", "DEBUG", "--log-file", "run.log", "--s3-bucket", s3_server.bucket)
    dead = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    said = ""
    for command, place in ((["run", "--dry-run"], {}), (["run"], dead), (["doctor"], {}), (["run"], {})):
        finished = job.run(*command, *loud, **(SECRETS | place))
        said += finished.stdout + finished.stderr
    said += (job.folder / "run.log").read_text()
    assert "completed 3" in said
    assert "cannot be reached" in said
    for secret in SECRETS.values():
        assert secret not in said


@pytest.mark.parametrize(
    ("refused", "status", "statuses"),
    [
        (lambda _: Response("", status=403), 1, ["pending"] * 3),
        (
            lambda request: Response(
                "", status=400 if request.path.endswith(f"/{SCENES[0].name}.png") else 200
            ),
            3,
            ["error", "completed", "completed"],
        ),
    ],
    ids=["every object", "one object"],
)
def test_a_refusal_costs_what_it_is_about(job, httpserver, refused, status, statuses):
    """A bucket that refuses all ends the run and fails no prompt; one refused object fails its prompt."""
    httpserver.expect_request("/stub", method="HEAD").respond_with_data("")
    httpserver.expect_request(re.compile("/stub/.*"), method="PUT").respond_with_handler(refused)
    endpoint = httpserver.url_for("").rstrip("/")
    finished = job.run("run", "--s3-bucket", "stub", "--s3-endpoint", endpoint)
    assert finished.returncode == status, finished.stderr
    rows = job.rows("datasets")
    assert [row["status"] for row in rows] == statuses
    assert {row["error_code"] for row in rows} == ({None} if status == 1 else {None, "storage_rejected"})


def test_folders_stand_in_a_bucket_as_well(job, s3_server):
    """``--layout folders`` puts the same objects under the prefix, whole, each with its own content type."""
    loop = ("--evaluator", "demo", "--candidates", "2", "--limit", "1")
    finished = job.run("run", "--output", f"s3://{s3_server.bucket}/art", "--layout", "folders", *loop)
    assert finished.returncode == 0, finished.stderr
    (done,) = [row for row in job.rows("datasets") if row["status"] == "completed"]
    bucket = client(s3_server)
    objects = {
        each["Key"]: bucket.get_object(Bucket=s3_server.bucket, Key=each["Key"])
        for each in bucket.list_objects_v2(Bucket=s3_server.bucket)["Contents"]
    }
    place = done["image_url"].removeprefix(f"s3://{s3_server.bucket}/").rpartition("/")[0]
    assert place.startswith("art/results/~2E.~2F")  # the first id's, which would climb out of its folder
    kinds = {"png": "image/png", "json": "application/json", "yaml": "application/yaml"}
    files = (
        *("iteration_1.png", "iteration_1_image_2.png", "iteration_1_results.json"),
        *("iteration_1_results.yaml", "iteration_1_evaluation.json", "summary.json"),
    )
    run = {f"art/{name}" for name in ("summary.json", "contact-sheet.png", "scores.png")}
    assert set(objects) == {f"{place}/{name}" for name in files} | run
    for name, found in objects.items():
        assert found["ContentType"] == kinds[name.rpartition(".")[2]]
    summary = json.loads(objects[f"{place}/summary.json"]["Body"].read())
    assert summary["best"]["image_url"] == done["image_url"]
