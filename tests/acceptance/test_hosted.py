"""The job with a hosted generator, as a process: ``--generator fal:…``, SQLite, a folder, no torch."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
from contextlib import closing

import pytest
from PIL import Image

from tests.acceptance import product
from tests.servers import free_port
from tests.servers.fal import KEY, MODEL, shade
from tests.waiting import until

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--generator", f"fal:{MODEL}")
SMALL = ("--width", "128", "--height", "64")


def _variables(fal):
    return {"FAL_KEY": KEY, "GENERATOR_URL": fal.url}


def _enqueue(folder, *rows):
    product.add(folder, *rows)


def _run(folder, fal, *arguments, **variables):
    return product.run(*JOB, *SMALL, *arguments, folder=folder, **{**_variables(fal), **variables})


def _prompts(folder):
    """What the database holds of the prompts, by their ids."""
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        database.row_factory = sqlite3.Row
        return {row["_id"]: dict(row) for row in database.execute("SELECT * FROM datasets")}


def _used(folder):
    """What each of the pictures was made with, by the prompts' ids."""
    return {name: json.loads(row["used"]) for name, row in _prompts(folder).items() if row["used"]}


def _begun(folder):
    """The ids of those of which it is written down that work on them has begun."""
    return {name for name, row in _prompts(folder).items() if row["started_claim"] is not None}


def _untouched(prompt):
    """Whether it waits, nobody holds it, and none of its tries is used up."""
    return (prompt["status"], prompt["claimed_by"], prompt["attempts"] or 0) == ("pending", None, 0)


def _running(folder, fal, *arguments):
    return product.running(*JOB, *SMALL, *arguments, folder=folder, **_variables(fal))


def test_prompts_become_pictures(tmp_path, fal):
    """Ten prompts, ten pictures of the right seed; what was used and billed is recorded, and a prompt that
    the service refuses is the only one that fails.
    """
    _enqueue(tmp_path, *({"id": f"p{n}", "text": f"a boat {n}", "seed": n} for n in range(10)))
    fal.plan("a boat 3", result=[(422, {}, {"detail": [{"loc": ["body", "seed"], "msg": "no threes"}]})])
    finished = _run(tmp_path, fal)
    assert finished.returncode == 3, finished.stderr
    assert finished.stdout.startswith("completed 9, failed 1, remaining 0; ")
    refused = _prompts(tmp_path)["p3"]
    assert (refused["error_code"], refused["status"]) == ("invalid_parameters", "error")
    for n, used in ((int(name[1:]), used) for name, used in _used(tmp_path).items()):
        with Image.open(tmp_path / "pictures" / f"p{n}.png") as image:
            assert image.getpixel((5, 5)) == shade(n)
            assert image.size == (128, 64)
        assert (used["seed"], used["model"], used["scheduler"]) == (n, f"fal:{MODEL}", "hosted")
        # What this model uses by itself, and not the defaults of models that are loaded here.
        assert (used["num_inference_steps"], used["guidance_scale"]) == (28, 3.5)
        assert used["billed_units"] == 1.5
        assert used["request_id"] in fal.requests


def test_what_was_chosen_elsewhere_is_recorded(tmp_path, fal):
    """A picture of another size and seed than asked for is kept, and recorded as it is."""
    _enqueue(tmp_path, {"id": "p", "text": "a boat", "seed": 5, "width": 256, "height": 256})
    fal.plan("a boat", size=(320, 192), fields={"seed": 77})
    finished = _run(tmp_path, fal)
    assert finished.returncode == 0, finished.stderr
    said = [json.loads(line)["message"] for line in product.errors(finished)]
    assert "p is 320×192, not 256×256 as requested" in said
    assert "p was generated with seed 77, not 5 as requested" in said
    used = _used(tmp_path)["p"]
    assert (used["width"], used["height"], used["seed"]) == (320, 192, 77)


def test_a_refused_key_ends_the_run_and_shows_itself_nowhere(tmp_path, fal):
    """Status 1, one line, prompts released; the key is in no line and no document, also at DEBUG."""
    _enqueue(tmp_path, {"id": "p", "text": "a boat"})
    finished = _run(tmp_path, fal, "--log-level", "DEBUG", FAL_KEY="hush-4711:hush-4712")
    assert finished.returncode == 1
    assert "fal refuses the key (401: " in product.errors(finished)[-1]
    assert "hush" not in finished.stdout + finished.stderr
    assert _untouched(_prompts(tmp_path)["p"])
    assert b"hush" not in (tmp_path / "prompts.db").read_bytes()


def test_an_unknown_model_ends_the_run(tmp_path, fal):
    """Status 1 and one line that names the model; the prompt is pending again."""
    _enqueue(tmp_path, {"id": "p", "text": "a boat"})
    finished = _run(tmp_path, fal, "--generator", "fal:fal-ai/nothing")
    assert finished.returncode == 1
    assert "fal has no model fal-ai/nothing" in product.errors(finished)[-1]
    assert _untouched(_prompts(tmp_path)["p"])


def test_a_service_that_is_away_burns_no_tries(tmp_path, fal):
    """Status 1 after the patience, every prompt pending and none of its tries used; later all are made."""
    _enqueue(tmp_path, *({"id": f"p{n}", "text": f"a boat {n}"} for n in range(4)))
    fal.down = True
    finished = _run(tmp_path, fal, "--generator-patience", "1")
    assert finished.returncode == 1
    assert "fal answers 503" in product.errors(finished)[-1]
    assert all(_untouched(prompt) for prompt in _prompts(tmp_path).values())
    fal.down = False
    assert _run(tmp_path, fal).stdout.startswith("completed 4, failed 0, remaining 0; ")


def test_what_may_go_better_is_tried_again(tmp_path, fal):
    """A malformed answer fails one try; the run waits, tries again, and the picture comes."""
    _enqueue(tmp_path, {"id": "p", "text": "a boat"}, {"id": "q", "text": "a cat"})
    fal.plan("a boat", result=[(200, {}, b"<html>")])
    finished = _run(tmp_path, fal)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("completed 2, failed 0, remaining 0; ")
    assert fal.texts().count("a boat") == 2


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_takes_the_requests_back(tmp_path, fal, number, status):
    """Asked to end while requests wait at the service, a run cancels them there and ends by itself, and its
    prompts are pending, no try used.
    """
    texts = [f"a boat {n}" for n in range(3)]
    _enqueue(tmp_path, *({"id": text, "text": text} for text in texts))
    for text in texts:
        fal.plan(text, states=["IN_QUEUE"])
    with _running(tmp_path, fal) as process:
        until(lambda: len(fal.requests) == 3, ended=process.poll)
        process.send_signal(number)
        _, log = process.communicate()
    assert (process.returncode, product.GRACE_EXCEEDED in log) == (status, False)
    assert sorted(fal.cancelled) == texts
    assert all(_untouched(prompt) for prompt in _prompts(tmp_path).values())


def test_a_killed_run_is_taken_up_by_the_next(tmp_path, fal):
    """After SIGKILL in the middle of a batch the next run makes what was left, and nothing that was done; the
    death counts against those alone that were at the service.
    """
    _enqueue(tmp_path, *({"id": f"p{n}", "text": f"a boat {n}", "priority": -n} for n in range(6)))
    stuck, blamed = ("a boat 2", "a boat 3"), {"p2": 1, "p3": 1}
    for text in stuck:
        fal.plan(text, states=["IN_QUEUE"])
    with _running(tmp_path, fal, "--batch-size", "2") as process:
        until(lambda: set(stuck) <= set(fal.texts()), ended=process.poll)
        until(lambda: len(_used(tmp_path)) == 2, ended=process.poll)
        until(lambda: blamed.keys() <= _begun(tmp_path), ended=process.poll)  # written down beside the work
        process.kill()
        process.wait()
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute("UPDATE datasets SET lease_expires_at = 0 WHERE claimed_by IS NOT NULL")
    with _running(tmp_path, fal, "--batch-size", "2") as process:
        until(lambda: len(fal.requests) == 6, ended=process.poll)
        assert {name: row["deaths"] for name, row in _prompts(tmp_path).items() if row["deaths"]} == blamed
        for text in stuck:
            fal.plans[text].states = ["COMPLETED"]
        said, _ = process.communicate()
    assert said.startswith("completed 4, failed 0, remaining 0; ")
    assert sorted(fal.texts()) == sorted([*(f"a boat {n}" for n in range(6)), *stuck])


def test_wrong_usage(tmp_path):
    """Options that mean a model loaded here, or that cannot be, are refused with status 2 and one line."""
    wrong = [
        (("--generator", "dall-e"), r"--generator \(GENERATOR\) must be local, or fal:MODEL"),
        (("--generator", "fal:../../x"), r"--generator \(GENERATOR\) must be local, or fal:MODEL"),
        (("--model-id", "someone/model"), "--model-id .* leave one of them out"),
        (("--model-base", "someone/model"), "--model-base .* leave one of them out"),
        (("--variant", "fp16"), "--variant .* leave one of them out"),
        (("--compile", "always"), "--compile always .* leave one of them out"),
        (("--autoencoder", "someone/taesd"), "--autoencoder .* leave one of them out"),
        (("--feature-cache", "3"), "--feature-cache .* leave one of them out"),
        (("--scheduler", "euler"), "--scheduler .* leave one of them out"),
        (("--generator-url", "http://example.com"), "--generator-url must be a URL like"),
        (("--fal-ai-api-key", "two words"), "the key contains characters that an HTTP header cannot carry"),
    ]
    each = product.run_each([(*JOB, *arguments) for arguments, _ in wrong], tmp_path, FAL_KEY=KEY)
    for (_, words), finished in zip(wrong, each, strict=True):
        assert finished.returncode == 2, finished
        assert re.search(words, product.errors(finished)[-1])
    assert not list(tmp_path.glob("*/prompts.db"))


def test_without_a_key(tmp_path):
    """Status 2, and the line names the variable; a GPU that the image asks for is no matter."""
    finished = product.run(*JOB, folder=tmp_path, DEVICE="cuda")
    assert finished.returncode == 2
    assert "needs a key; set FAL_AI_API_KEY" in product.errors(finished)[-1]


def test_doctor_and_dry_run(tmp_path, fal):
    """Doctor asks for the price and needs no device; --dry-run names the model and its own steps."""
    _enqueue(tmp_path, {"id": "p", "text": "a boat"})
    checked = product.run("doctor", *JOB, folder=tmp_path, DEVICE="cuda", **_variables(fal))
    assert (
        "generator ok      fal-ai/flux/dev: the key is accepted; 0.025 USD per megapixels" in checked.stdout
    )
    assert checked.returncode == 0
    refused = product.run("doctor", *JOB, folder=tmp_path, **{**_variables(fal), "FAL_KEY": "another"})
    assert "generator FAILED  fal refuses the key (401" in refused.stdout
    assert refused.returncode == 1
    shown = _run(tmp_path, fal, "--dry-run")
    assert f"1 prompts would be generated by fal:{MODEL}" in shown.stdout
    assert "28 steps, guidance 3.5" in shown.stdout
    assert fal.submitted == []


def test_a_dry_run_tells_what_the_generator_would_refuse(tmp_path, fal):
    """A LoRA and a scheduler, which nobody at fal heeds, fail in a dry run as they do in the run."""
    _enqueue(
        tmp_path,
        {"id": "plain", "text": "a boat"},
        {"id": "lora", "text": "a boat", "lora": {"path": "artist/ink"}},
        {"id": "scheduler", "text": "a boat", "scheduler": "euler"},
    )
    shown = _run(tmp_path, fal, "--dry-run").stdout
    assert "  lora would fail: a hosted model takes no LoRAs" in shown
    assert "  scheduler would fail: scheduler euler is not supported by this model" in shown
    assert shown.count("batch ") == 1
    assert _run(tmp_path, fal).returncode == 3
    codes = {name: row["error_code"] for name, row in _prompts(tmp_path).items()}
    assert codes == {"plain": None, "lora": "lora_failed", "scheduler": "invalid_parameters"}


def test_a_service_that_is_not_there(tmp_path, fal):
    """Doctor says so in one line, within its time."""
    away = {"FAL_AI_API_KEY": KEY, "GENERATOR_URL": f"http://127.0.0.1:{free_port()}"}
    checked = product.run("doctor", *JOB, folder=tmp_path, **away)
    assert "generator FAILED  fal's prices cannot be queried: 127.0.0.1 refuses connections" in checked.stdout
