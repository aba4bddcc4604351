"""An evaluator beside a run: scores in documents, results and the callback, and no picture lost for one."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import threading
from contextlib import closing

from werkzeug import Response

from tests.acceptance import product
from tests.acceptance.product import sleeping
from tests.waiting import until

JOB = (
    *("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL)),
    *("--input-file", "prompts.json"),
)
PROMPTS = [
    {"id": "right", "text": "a large red circle on a white background", "seed": 7},
    {"id": "unread", "text": "a sunset over mountains", "seed": 7},
    {"id": "several", "text": "a large blue star on a yellow background", "seed": 7, "num_images": 2},
]


def _rows(folder, statement, key):
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        database.row_factory = sqlite3.Row
        return {row[key]: dict(row) for row in database.execute(statement)}


def test_scores_are_recorded_and_told(tmp_path, httpserver):
    """A picture that shows its prompt scores 1, in the prompt, its result and the callback; one whose prompt
    the evaluator cannot read is stored without a score and says why; each of two pictures has its own.
    """
    httpserver.expect_request("/told", method="POST").respond_with_data("")
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    told = ("--callback-url", httpserver.url_for("/told"))
    finished = sleeping.run(*JOB, *told, "--evaluator", "demo", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    prompts = _rows(tmp_path, "SELECT * FROM datasets", "_id")
    results = _rows(tmp_path, "SELECT * FROM dataset_records", "dataset_id")
    for rows in (prompts, results):
        assert rows["right"]["score"] == 1.0
        assert json.loads(rows["right"]["evaluation"])["matches"][1] == "colour red"
        assert rows["unread"]["score"] is None
        assert "error" in json.loads(rows["unread"]["evaluation"])
        assert json.loads(rows["several"]["scores"]) == [1.0, 1.0]
    assert (tmp_path / "pictures" / "unread.png").exists()
    assert "unread has no score" in finished.stderr
    assert "; mean score 1.00; 1 without a score (retry --unscored); " in finished.stdout
    body = httpserver.log[0][0].get_json()
    assert {one["prompt_id"]: one.get("score") for one in body["results"]} == {
        "right": 1.0,
        "several": 1.0,
        "unread": None,
    }


def test_an_evaluator_that_cannot_be_is_status_2(tmp_path):
    """What can be known beforehand is, and costs no prompt: a wrong name, and a key that is missing."""
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    wrong = {
        "judge": "it should be none, clip",
        "clip:": "it should be none, clip",
        "gemini": "GEMINI_API_KEY",
    }
    job = (*JOB[:-1], str(tmp_path / "prompts.json"))
    each = product.run_each([(*job, "--evaluator", chosen) for chosen in wrong], tmp_path)
    for says, refused in zip(wrong.values(), each, strict=True):
        assert refused.returncode == 2
        assert says in product.errors(refused)[-1]
    assert not list(tmp_path.glob("*/pictures/*"))


def _stopped_while_judging(tmp_path, httpserver, *loop):
    """The row of a prompt whose run was asked to end while the evaluator said nothing, and its last line."""
    asked, over = threading.Event(), threading.Event()

    def hang(_request):
        asked.set()
        over.wait()
        return Response("late")

    httpserver.expect_request(re.compile("/v1.*")).respond_with_handler(hang)
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS[:1]))
    gemini = {"GOOGLE_GEMINI_BASE_URL": httpserver.url_for("/"), "GEMINI_API_KEY": "k"}
    with sleeping.running(*JOB, "--evaluator", "gemini", *loop, folder=tmp_path, **gemini) as process:
        until(asked.is_set, ended=process.poll)
        process.send_signal(signal.SIGTERM)
        said, log = process.communicate()
    over.set()
    assert (process.returncode, product.GRACE_EXCEEDED in log) == (143, False)
    (row,) = _rows(tmp_path, "SELECT * FROM datasets", "_id").values()
    return row, said


def test_a_stop_does_not_wait_for_a_score(tmp_path, httpserver):
    """Asked to end while the evaluator says nothing, a run ends by itself, and the picture that was stored is
    recorded: without a score, and with the reason.
    """
    row, said = _stopped_while_judging(tmp_path, httpserver)
    assert said.startswith("completed 1, failed 0, ")
    assert (row["status"], row["score"]) == ("completed", None)
    assert json.loads(row["evaluation"])["error"] == "there was no score in time"


def test_a_loop_that_is_stopped_goes_on_later(tmp_path, httpserver):
    """In a loop such a picture is no result yet: the prompt is given back, to be judged by the next run."""
    row, said = _stopped_while_judging(tmp_path, httpserver, "--iterations", "2")
    assert said.startswith("completed 0, failed 0, remaining 1")
    assert (row["status"], row["tries"], row["claimed_by"]) == ("pending", None, None)
