"""The evaluator behind Google's API: the real client, against a local server that speaks its protocol."""

from __future__ import annotations

import base64
import io
import json
import re
import threading

import numpy as np
import pytest
from PIL import Image
from werkzeug import Response

from tests.servers import free_port
from text2img.errors import ConfigurationError, EvaluationFailed, EvaluatorFailed
from text2img.evaluation.gemini import GeminiEvaluator

ASKED = re.compile(r"/v1[a-z]*/models/gemini-2\.5-flash:generateContent")
KEY = "a-key-that-nobody-may-see"
PIXELS = np.full((64, 96, 3), (200, 30, 30), dtype=np.uint8)
GOOD = {"score": 0.75, "matches": ["red"], "missing": ["a circle"], "better_prompt": "a red circle, centred"}


@pytest.fixture
def evaluator(httpserver, monkeypatch):
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", httpserver.url_for("/"))
    made = GeminiEvaluator(KEY)
    made.check()
    made.load()
    return made


def _answer(text):
    parts = [{"text": text if isinstance(text, str) else json.dumps(text)}]
    return {"candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": "STOP"}]}


def _says(httpserver, text):
    httpserver.expect_request(ASKED, method="POST").respond_with_json(_answer(text))


def test_it_sends_the_picture_and_reads_the_answer(httpserver, evaluator):
    """Picture, prompt and the answer's form are sent; the answer becomes an evaluation."""
    _says(httpserver, GOOD)
    found = evaluator.evaluate(PIXELS, "a red circle")
    assert (found.score, found.matches, found.missing) == (0.75, ("red",), ("a circle",))
    assert found.better_prompt == "a red circle, centred"
    assert found.evaluator == "gemini:gemini-2.5-flash"
    request, _ = httpserver.log[0]
    sent = request.get_json()
    image, task = sent["contents"][0]["parts"]
    seen = Image.open(io.BytesIO(base64.urlsafe_b64decode(image["inlineData"]["data"])))
    assert seen.size == (96, 64)
    assert "a red circle" in task["text"]
    assert sent["generationConfig"]["responseMimeType"] == "application/json"
    assert request.headers["x-goog-api-key"] == KEY


@pytest.mark.parametrize(
    "said",
    [
        "no JSON at all",
        "[]",
        GOOD | {"score": 7},
        GOOD | {"score": True},
        GOOD | {"score": "high"},
        GOOD | {"matches": "red"},
        {"score": 0.5},
        "",
    ],
    ids=repr,
)
def test_a_malformed_answer_is_no_evaluation(httpserver, evaluator, said):
    """What does not have the form that was asked for is refused with a sentence, never read as a score."""
    _says(httpserver, said)
    with pytest.raises(EvaluationFailed, match="gemini"):
        evaluator.evaluate(PIXELS, "a red circle")


@pytest.mark.parametrize("better", ["", "a red circle", "x" * 5000, "a\0b", 7])
def test_a_prompt_that_would_not_do_is_not_suggested(httpserver, evaluator, better):
    """No better prompt comes of an empty, equal, endless or unreadable one; the score counts all the same."""
    _says(httpserver, GOOD | {"better_prompt": better})
    found = evaluator.evaluate(PIXELS, "a red circle")
    assert (found.score, found.better_prompt) == (0.75, None)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_service_may_answer_later(httpserver, evaluator, status):
    """The failure is marked as one that may pass; the worker repeats the request, the client does not."""
    httpserver.expect_request(ASKED).respond_with_json(
        {"error": {"code": status, "message": "busy", "status": "BUSY"}}, status=status
    )
    with pytest.raises(EvaluationFailed, match=str(status)) as raised:
        evaluator.evaluate(PIXELS, "a red circle")
    assert raised.value.retryable
    assert len(httpserver.log) == 1


def test_a_service_that_is_away_may_answer_later(monkeypatch):
    """A refused connection is a failure that may pass."""
    monkeypatch.setenv("GOOGLE_GEMINI_BASE_URL", f"http://127.0.0.1:{free_port()}")
    evaluator = GeminiEvaluator(KEY)
    evaluator.load()
    with pytest.raises(EvaluationFailed) as raised:
        evaluator.evaluate(PIXELS, "a red circle")
    assert raised.value.retryable


@pytest.mark.parametrize(
    ("status", "details", "error"),
    [
        (400, [], EvaluationFailed),
        (400, [{"reason": "API_KEY_INVALID"}], EvaluatorFailed),
        (401, [], EvaluatorFailed),
        (403, [], EvaluatorFailed),
        (404, [], EvaluatorFailed),
    ],
)
def test_a_refusal_names_the_status_and_no_secret(httpserver, evaluator, status, details, error):
    """A refusal is not tried again, and one of the key or the model is that of every image; its sentence has
    the status, not the key nor the answer's words.
    """
    answer = {
        "code": status,
        "message": f"the key {KEY} is not good",
        "status": "REFUSED",
        "details": details,
    }
    httpserver.expect_request(ASKED).respond_with_json({"error": answer}, status=status)
    with pytest.raises(error, match=str(status)) as raised:
        evaluator.evaluate(PIXELS, "a red circle")
    assert not getattr(raised.value, "retryable", False)
    assert KEY not in str(raised.value)
    assert len(httpserver.log) == 1


def test_a_blocked_prompt_says_why(httpserver, evaluator):
    """An answer without a candidate is no score; the reason that the service gives is passed on."""
    httpserver.expect_request(ASKED).respond_with_json({"promptFeedback": {"blockReason": "SAFETY"}})
    with pytest.raises(EvaluationFailed, match="SAFETY"):
        evaluator.evaluate(PIXELS, "a red circle")


def test_a_service_that_hangs_is_left(httpserver, evaluator):
    """An answer is waited for no longer than the evaluator's timeout, which the message names."""
    over = threading.Event()

    def hang(_request):
        over.wait()
        return Response("late")

    httpserver.expect_request(ASKED).respond_with_handler(hang)
    hurried = GeminiEvaluator(KEY, timeout=0.1)
    hurried.load()
    try:
        with pytest.raises(EvaluationFailed, match=r"no answer within 0\.1 s"):
            hurried.evaluate(PIXELS, "a red circle")
    finally:
        over.set()


def test_without_a_key_it_is_not_begun():
    """The key that is missing is found out before there is work, and named."""
    with pytest.raises(ConfigurationError, match="GEMINI_API_KEY"):
        GeminiEvaluator(None).check()
