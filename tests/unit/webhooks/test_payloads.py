"""An entry's body and id."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from text2img.databases import UndeliveredOutcome, webhook_id
from text2img.prompts import PromptId
from text2img.webhooks.payloads import callback_payload, webhook_payload

DONE = UndeliveredOutcome(
    id=PromptId("str", "123"), text="a sunset", image_url="gs://b/generated/123.png", seed=7
)
FAILED = UndeliveredOutcome(
    id=PromptId("int", "124"), text=None, code="invalid_prompt", message="text is missing"
)


def test_body_is_what_the_contract_says():
    """A completed and a failed prompt make the documented fields and nothing else."""
    assert json.loads(callback_payload("run-1", "completed", [DONE, FAILED], final=True)) == {
        "run_id": "run-1",
        "status": "completed",
        "final": True,
        "results": [
            {
                "prompt_id": "123",
                "record_id": "123",
                "prompt": "a sunset",
                "image_url": "gs://b/generated/123.png",
                "gcs_url": "gs://b/generated/123.png",
                "seed": 7,
            }
        ],
        "errors": [
            {"prompt_id": "124", "prompt": None, "error_code": "invalid_prompt", "error": "text is missing"}
        ],
        "counts": {"completed": 1, "error": 1},
    }


def test_picture_in_a_folder_has_no_gcs_url():
    """Outside of Cloud Storage gcs_url is null, while image_url says where the picture is."""
    local = UndeliveredOutcome(id=PromptId("int", "1"), text="x", image_url="/pictures/1.png", seed=0)
    [result] = json.loads(callback_payload("r", "running", [local], final=False))["results"]
    assert (result["image_url"], result["gcs_url"]) == ("/pictures/1.png", None)


def test_public_picture_has_both_urls():
    """The receiver gets the URL that anybody may follow, and where the picture is on Cloud Storage."""
    public = "https://storage.googleapis.com/b/a%20b.png"
    open_to_all = UndeliveredOutcome(id=PromptId("int", "1"), text="x", image_url=public, seed=0)
    [result] = json.loads(callback_payload("r", "running", [open_to_all], final=False))["results"]
    assert (result["image_url"], result["gcs_url"]) == (public, "gs://b/a b.png")


@pytest.mark.parametrize("text", ["日の出 🌅", 'quote " \\ \0 \n', float("nan"), 7, ["x"]])
def test_any_text_makes_plain_json(text):
    """Whatever stands in a prompt, the body is ASCII JSON that gives texts back and null for all else."""
    body = callback_payload(
        "r", "running", [UndeliveredOutcome(id=PromptId("str", "\ud800"), text=text, code="c")], final=False
    )
    assert body.isascii()
    assert "NaN" not in body
    [error] = json.loads(body)["errors"]
    assert error["prompt"] == (text if isinstance(text, str) else None)


def test_half_a_character_is_text():
    """A lone surrogate, which strict readers of JSON refuse, is shown escaped; ids stay different."""
    ids = [PromptId("str", text) for text in ("\ud800", "\ud801")]
    outcomes = [UndeliveredOutcome(id=each, text="half a pair \udfff", image_url="x\udc80") for each in ids]
    results = json.loads(callback_payload("r", "running", outcomes, final=False))["results"]
    assert [result["prompt_id"] for result in results] == ["\\ud800", "\\ud801"]
    assert {(result["prompt"], result["image_url"]) for result in results} == {
        ("half a pair \\udfff", "x\\udc80")
    }


BAD = {
    "id": PromptId("bson", None),
    "text": float("nan"),
    "image_url": b"x",
    "image_urls": 7,
    "seed": 10**5000,
    "score": float("inf"),
    "iterations": float("nan"),
    "steps": datetime.now(UTC),
    "guidance_scale": float("-inf"),
    "code": 7,
    "message": {1: b"x"},
    "attempts": "x",
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("base", [DONE, FAILED], ids=["completed", "failed"])
def test_one_bad_outcome_never_holds_back_the_others(base, name):
    """Whatever an outcome holds, the others' entries are whole, and it has one as well, in both payloads."""
    bad = replace(base, **{name: BAD[name]})
    alone = json.loads(callback_payload("r", "running", [DONE, FAILED], final=False))
    body = json.loads(
        callback_payload("r", "running", [bad, DONE, FAILED], final=False), parse_constant=pytest.fail
    )
    assert body["results"][-1] == alone["results"][0]
    assert body["errors"][-1] == alone["errors"][0]
    assert sum(body["counts"].values()) == 3
    endpoint, own = webhook_payload(bad)
    assert endpoint == ("complete" if bad.code is None else "failed")
    assert "generation_id" in json.loads(own, parse_constant=pytest.fail)


def test_a_score_that_json_cannot_say_is_left_out():
    """The result is told without it, as one of an unscored image."""
    body = callback_payload("r", "running", [replace(DONE, score=float("inf"), seed=2**70)], final=False)
    [result] = json.loads(body)["results"]
    assert ("score" in result, result["seed"]) == (False, None)


def test_body_fits_one_document():
    """A thousand long prompts, one of the greatest length, are cut evenly: one document holds the body."""
    outcomes = [
        UndeliveredOutcome(
            id=PromptId("int", str(n)), text="🌅" * (1000 if n else 20_000), image_url="gs://b/x"
        )
        for n in range(1000)
    ]
    body = callback_payload("r", "completed", outcomes, final=True)
    assert len(body) < 12_000_000
    texts = {result["prompt"] for result in json.loads(body)["results"]}
    assert len(texts) == 1
    assert texts.pop().endswith("🌅…")


def test_ids_are_random():
    """No two ids agree, and each has the prefix that Standard Webhooks suggests."""
    ids = {webhook_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(each.startswith("msg_") and each[4:].isalnum() for each in ids)


HUGE = "é" * 3_000_000


@pytest.mark.parametrize(
    "change",
    [{"id": PromptId("str", HUGE)}, {"image_url": HUGE}, {"image_urls": (HUGE,) * 2}, {"text": HUGE}],
    ids=["id", "image_url", "image_urls", "text"],
)
def test_one_outcome_fits_a_document_whatever_is_large(change):
    """MongoDB refuses bodies of 16 MB, and would keep the notification from being saved, each time."""
    outcome = replace(DONE, **change)
    body = callback_payload("r", "running", [outcome], final=False)
    assert len(body) < 10_000_000
    assert json.loads(body)["results"][0]["seed"] == 7
    _, own = webhook_payload(outcome)
    assert len(own) < 10_000_000
    assert json.loads(own)["metadata"]["seed"] == 7


@pytest.mark.parametrize("field", ["code", "message"])
def test_one_failure_fits_a_document(field):
    """Neither a code nor a message that another program has written makes a body that cannot be saved."""
    body = callback_payload("r", "running", [replace(FAILED, **{field: HUGE})], final=False)
    _, own = webhook_payload(replace(FAILED, **{field: HUGE}))
    assert max(len(body), len(own)) < 10_000_000
    assert json.loads(body)["errors"][0]["prompt_id"] == "124"
    assert json.loads(own)["generation_id"] == 124
