"""An evaluator that cannot judge: refused credentials, an outage, and scores that come later."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing

import pytest
from werkzeug import Response

from tests.acceptance import product
from tests.acceptance.product import SCENE, sleeping

JOB = (
    *("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL)),
    *("--evaluator", "gemini", "--evaluator-timeout", "1", "--batch-size", "2"),
)
ASKED = re.compile(r"/v1.*:generateContent")
GOOD = {"score": 0.75, "matches": [], "missing": [], "better_prompt": ""}
PROMPTS = [
    {"id": "one", "text": SCENE, "seed": 7},
    {"id": "two", "text": SCENE, "seed": 8, "num_images": 2},
    {"id": "three", "text": SCENE, "seed": 9},
]


@pytest.fixture
def gemini(httpserver):
    """A service that answers as ``answers`` says: a status, or a body; the last one again and again."""
    answers = [GOOD]

    def handle(_request):
        answer = answers[0] if len(answers) == 1 else answers.pop(0)
        if isinstance(answer, Response):
            return answer
        parts = [{"text": json.dumps(answer)}]
        return Response(json.dumps({"candidates": [{"content": {"role": "model", "parts": parts}}]}))

    httpserver.expect_request(ASKED).respond_with_handler(handle)
    httpserver.answers = answers
    return httpserver


def _run(folder, gemini, *arguments, program=sleeping):
    variables = {"GOOGLE_GEMINI_BASE_URL": gemini.url_for("/"), "GEMINI_API_KEY": "k3y"}
    return program.run(*arguments, folder=folder, **variables)


def _refusal(status, reason=""):
    details = {"code": status, "message": "the key k3y is wrong", "status": "REFUSED", "details": reason}
    return Response(json.dumps({"error": details}), status)


def _rows(folder):
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        database.row_factory = sqlite3.Row
        return {row["_id"]: dict(row) for row in database.execute("SELECT * FROM datasets")}


def _images(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "pictures").glob("*.png")}


@pytest.mark.parametrize(
    "answer",
    [_refusal(400, [{"reason": "API_KEY_INVALID"}]), _refusal(503)],
    ids=["API_KEY_INVALID", "503"],
)
def test_a_judge_who_cannot_judge_ends_the_run(tmp_path, gemini, answer):
    """Status 1, one line that names the key or the timeout; a refusal is not tried again. Each prompt stays
    pending; the next run scores the stored images, which are not generated again, and completes them.
    """
    product.add(tmp_path, *PROMPTS)
    gemini.answers[:] = [answer]
    failed = _run(tmp_path, gemini, "run", *JOB)
    assert failed.returncode == 1, failed.stderr
    message = json.loads(product.errors(failed)[-1])["message"]
    words = "--evaluator-timeout 1 s" if answer.status_code == 503 else "check GEMINI_API_KEY"
    assert words in message
    assert "k3y" not in failed.stderr
    assert product.counts(tmp_path) == {"pending": 3}
    stored = _images(tmp_path)
    assert stored
    asked = len(gemini.log)
    assert asked > 2 if answer.status_code == 503 else asked <= 4
    gemini.answers[:] = [GOOD]
    done = _run(tmp_path, gemini, "run", *JOB)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("completed 3 (4 images), failed 0, remaining 0; mean score 0.75")
    assert stored.items() <= _images(tmp_path).items()
    rows = _rows(tmp_path)
    assert {name: row["score"] for name, row in rows.items()} == {"one": 0.75, "two": 0.75, "three": 0.75}
    assert json.loads(rows["two"]["scores"]) == [0.75, 0.75]
    assert {row["unscored_images"] for row in rows.values()} == {None}
    assert {row["attempts"] for row in rows.values()} == {None}


def test_what_waits_is_not_generated(tmp_path, gemini):
    """The device gets no batch for an image that is stored, unless its prompt has changed since or the file
    is gone; a service that is away for a moment costs nothing.
    """
    product.add(tmp_path, *(prompt for prompt in PROMPTS if prompt["id"] != "two"))
    gemini.answers[:] = [_refusal(403)]
    assert _run(tmp_path, gemini, "run", *JOB).returncode == 1
    assert len(_images(tmp_path)) == 2
    gemini.answers[:] = [_refusal(503), _refusal(429), GOOD]
    (tmp_path / "pictures" / "three.png").unlink()
    patient = ("--evaluator-timeout", "30", "--log-level", "DEBUG")
    done = _run(tmp_path, gemini, "run", *JOB, *patient)
    assert done.returncode == 0, done.stderr
    batches = [line for line in map(json.loads, product.errors(done)) if line.get("event") == "batch"]
    assert [batch["size"] for batch in batches] == [1]
    assert "three will be generated again" in done.stderr
    assert {row["score"] for row in _rows(tmp_path).values()} == {0.75}


def test_only_a_prompts_own_image_as_it_is_asked_for_is_scored(tmp_path, gemini):
    """One whose document lists another's image, or asks for another scheduler since, is generated again."""
    product.add(tmp_path, *(prompt for prompt in PROMPTS if prompt["id"] != "two"))
    gemini.answers[:] = [_refusal(403)]
    assert _run(tmp_path, gemini, "run", *JOB).returncode == 1
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute(
            "UPDATE datasets SET unscored_images = replace(unscored_images, 'one.png', 'three.png')"
            " WHERE _id = 'one'"
        )
        database.execute("UPDATE datasets SET scheduler = 'euler' WHERE _id = 'three'")
    gemini.answers[:] = [GOOD]
    done = _run(tmp_path, gemini, "run", *JOB, "--log-level", "DEBUG")
    assert done.returncode == 0, done.stderr
    assert "one will be generated again: the image that its document lists is not its own" in done.stderr
    batches = [line for line in map(json.loads, product.errors(done)) if line.get("event") == "batch"]
    assert sum(batch["size"] for batch in batches) == 2
    rows = _rows(tmp_path)
    assert rows["one"]["image_url"].endswith("/one.png")
    assert json.loads(rows["three"]["used"])["scheduler"] == "euler"


def test_doctor_tries_a_real_call(tmp_path, gemini):
    """A key that is refused is found before a run."""
    product.add(tmp_path, *PROMPTS)
    gemini.answers[:] = [_refusal(403)]
    bad = _run(tmp_path, gemini, "doctor", *JOB)
    assert bad.returncode == 1
    assert "evaluator FAILED" in bad.stdout
    assert "GEMINI_API_KEY" in bad.stdout


def test_scores_are_made_up_for_without_generating(tmp_path):
    """``retry --unscored`` scores every stored image that has no score, in the prompt and its result, and
    leaves the others, the images and what cannot be scored as they are.
    """
    product.add(
        tmp_path, *PROMPTS, {"id": "unread", "text": "a sunset"}, {"id": "gone", "text": SCENE, "seed": 1}
    )
    run = ("run", *JOB[:6])
    assert sleeping.run(*run, folder=tmp_path).returncode == 0
    (tmp_path / "pictures" / "gone.png").unlink()
    before = _images(tmp_path)
    database = ("--database", f"sqlite:///{tmp_path}/prompts.db")
    refused, done, again = product.run_each(
        [
            ("retry", *database, "--unscored"),
            ("retry", *database, "--unscored", "--evaluator", "demo"),
            ("retry", *database, "--unscored", "--evaluator", "demo", "--json"),
        ],
        tmp_path,
    )
    assert (refused.returncode, "--evaluator" in refused.stderr) == (2, True)
    assert (done.returncode, done.stdout) == (0, "scored 4 images of 5 prompts; 2 still have no score\n")
    assert json.loads(again.stdout) == {"status": 0, "scored": 0, "unscored": 2}
    assert _images(tmp_path) == before
    rows = _rows(tmp_path)
    assert {name: row["score"] for name, row in rows.items()} == {
        "one": 1.0, "two": 1.0, "three": 1.0, "unread": None, "gone": None,
    }  # fmt: skip
    assert json.loads(rows["two"]["scores"]) == [1.0, 1.0]
    assert {row["status"] for row in rows.values()} == {"completed"}
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as connection:
        found = connection.execute("SELECT score FROM dataset_records WHERE score IS NOT NULL").fetchall()
    assert found == [(1.0,)] * 3
