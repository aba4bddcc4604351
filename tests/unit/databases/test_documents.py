"""What documents mean: fields become prompts and configurations, outcomes become fields."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import mongomock
import pytest

from tests.outcomes import completed
from text2img.databases import NewPrompt, Run
from text2img.databases.documents import (
    count_of,
    deaths_at_claim,
    new_fields,
    parse_id_candidates,
    prompt_of,
    undelivered_of,
)
from text2img.databases.outcome_updates import change_of, result_of, written_already
from text2img.databases.run_documents import run_fields, run_of
from text2img.errors import ErrorCode
from text2img.prompts import Claim, Failed, Prompt, PromptId, RequestedParameters, RetryLater, request

_CLAIM = Claim(PromptId("int", "1"), "w", 3)
_WISHES = RequestedParameters(num_inference_steps=20, guidance_scale=7.5, width=512, height=512, seed=7)
_PROMPT = Prompt(claim=_CLAIM, text="a boat", requested=_WISHES)


def _completed(url="gs://b/1.png"):
    return completed(request(_PROMPT, []), url, sha256="ab", truncated=True)


def _failed(message="no"):
    return Failed(prompt=_PROMPT, code=ErrorCode.SAFETY, message=message, attempts=2)


@pytest.mark.parametrize(
    ("value", "count"),
    [(2, 2), (2.0, 2), (None, 0), ("2", 0), (True, 0), (float("nan"), 0), (float("inf"), 0)],
)
def test_a_counter_is_a_finite_number_or_none(value, count):
    """Whatever an owner left in a counter's place counts as none."""
    assert count_of(value) == count


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("spring", ["spring"]),
        ("7", ["7", 7]),
        ("-7", ["-7", -7]),
        ("07", ["07", 7]),
        ("2.5", ["2.5", 2.5]),
        ("1e5", ["1e5"]),
        ("nan", ["nan"]),
        ("٧", ["٧"]),
        (str(2**63), [str(2**63)]),
        ("", [""]),
    ],
)
def test_an_id_in_text_reads_as_what_it_may_be(text, values):
    """As itself, and as a plain decimal number where it is one that a database can hold."""
    assert parse_id_candidates(text) == values


@pytest.mark.parametrize(
    ("fields", "deaths"),
    [
        ({}, 0),
        ({"status": "pending", "deaths": 2}, 2),
        ({"status": "processing", "claim_number": 3, "deaths": 2}, 2),
        ({"status": "processing", "claim_number": 3, "started_claim": 2}, 0),
        ({"status": "processing", "claim_number": 3, "started_claim": 3}, 1),
        ({"status": "processing", "claim_number": 3, "started_claim": 3, "deaths": 4}, 5),
        ({"status": "pending", "claim_number": 3, "started_claim": 3}, 0),
    ],
)
def test_a_death_is_a_lease_that_ran_out_on_the_device(fields, deaths):
    """It counts when the last claim had started, and not otherwise."""
    assert deaths_at_claim(fields) == deaths


def test_a_prompts_fields_stay_unchecked():
    """Text and wishes are taken as they stand; a priority that is no number counts as 0."""
    fields = {"text": 7, "width": "wide", "priority": "high", "attempts": 2.0, "other": 1}
    expected = Prompt(claim=_CLAIM, text=7, requested=RequestedParameters(width="wide"), attempts=2, deaths=1)
    assert prompt_of(_CLAIM, fields, 1) == expected
    assert prompt_of(_CLAIM, {"priority": 2}, 0).priority == 2
    assert prompt_of(_CLAIM, {"priority": True}, 0).priority == 0


def test_a_new_prompt_has_only_what_was_given():
    """What nobody wished is no field; a wish of 0 is one."""
    new = NewPrompt(
        id=PromptId("str", "a"), text="a boat", requested=RequestedParameters(seed=0), priority=0.0
    )
    assert new_fields(new) == {"text": "a boat", "seed": 0, "priority": 0.0, "status": "pending"}


def test_a_result_is_as_documented():
    """Field by field, as the contract has it."""
    assert result_of(_completed(), "r") == {
        "prompt": "a boat",
        "image_url": "gs://b/1.png",
        "gcs_url": "gs://b/1.png",
        "status": "completed",
        "negative_prompt": "",
        "seed": 7,
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "width": 512,
        "height": 512,
        "scheduler": "euler",
        "model": "m",
        "run_id": "r",
        "prompt_truncated": True,
        "claim_number": 3,
    }
    assert result_of(_completed("s3://b/1.png"), "r")["gcs_url"] is None
    public = "https://storage.googleapis.com/b/1.png"
    assert [result_of(_completed(public), "r")[name] for name in ("image_url", "gcs_url")] == [
        public,
        "gs://b/1.png",
    ]


def test_what_was_billed_is_the_sum_of_all_pictures():
    """The prompt's cost is that of all its pictures, in a loop of all tries, and unknown where one's is."""
    done = completed(request(_PROMPT, []), image_urls="abc", request_id="r")
    billed = [replace(one, used={**one.used, "billed_units": n + 0.5}) for n, one in enumerate(done.images)]
    assert result_of(replace(done, images=tuple(billed)), "r")["billed_units"] == 4.5
    partly = result_of(replace(done, images=(*billed[:2], done.images[2])), "r")
    assert ("billed_units" in partly, partly["request_id"]) == (False, "r")
    best = replace(done, images=(billed[1],), tries=tuple(billed), iterations=3)
    assert result_of(best, "r")["billed_units"] == 4.5


def test_each_outcome_changes_the_document_as_documented():
    """What is set, what goes, which moment is noted, and how long a postponed prompt waits."""
    done = change_of(_completed(), "r", notify=True)
    assert (done.fields["status"], done.fields["untold"], done.timestamp, done.wait) == (
        "completed",
        True,
        "completed_at",
        None,
    )
    assert {"claimed_by", "lease_expires_at", "error", "not_before"} <= set(done.removed)
    quiet = change_of(_failed(), "r", notify=False)
    assert (quiet.fields["error_code"], quiet.fields["attempts"], quiet.timestamp) == (
        "safety",
        2,
        "error_at",
    )
    assert {"untold", "image_url", "claimed_by"} <= set(quiet.removed)
    code = ErrorCode.GENERATION_FAILED
    late = change_of(
        RetryLater(prompt=_PROMPT, code=code, message="no", attempts=1, wait=8), "r", notify=True
    )
    assert (late.fields["status"], late.wait) == ("pending", 8)
    assert "untold" in late.removed


def test_a_repetition_is_recognised():
    """The same outcome under the same claim was written before; another, or another claim's, was not."""
    document = {**change_of(_completed(), "r", notify=True).fields, "claim_number": 3}
    assert written_already(_completed(), "r", document)
    assert not written_already(_completed(), "another run", document)
    assert not written_already(_completed(), "r", {**document, "claim_number": 4})
    assert not written_already(_failed(), "r", document)
    assert not written_already(_completed(), "r", {})


def test_the_changes_mean_the_same_to_mongodb():
    """Set and unset on a stored document, the outcome leaves the owner's fields and nothing of the claim."""
    collection = mongomock.MongoClient().db.datasets
    collection.insert_one({"_id": 1, "text": "a boat", "claimed_by": "w", "claim_token": "t", "mine": [1]})
    change = change_of(_failed("$no"), "r", notify=False)
    collection.update_one({"_id": 1}, {"$set": change.fields, "$unset": dict.fromkeys(change.removed, "")})
    assert collection.find_one() == {
        "_id": 1,
        "text": "a boat",
        "mine": [1],
        "status": "error",
        "error": "$no",
        "error_code": "safety",
        "attempts": 2,
        "run_id": "r",
    }


def test_what_is_told_depends_on_the_status():
    """A failed prompt's earlier picture, or a completed one's earlier error, is not told."""
    fields = {"text": "a", "image_url": "u", "used": {"seed": 1}, "error_code": "c", "error": "s"}
    told = undelivered_of(_CLAIM.id, {**fields, "status": "completed"})
    assert (told.image_url, told.seed, told.code, told.message) == ("u", 1, None, None)
    told = undelivered_of(_CLAIM.id, {**fields, "status": "error"})
    assert (told.image_url, told.seed, told.code, told.message) == (None, None, "c", "s")


def test_a_run_survives_its_document():
    """Out of its fields the same run comes again; a document without a start is none."""
    run = Run(id="r", started_at=datetime(2026, 1, 1, tzinfo=UTC), host="h", seconds={"claim": 1.5})
    assert run_of("r", run_fields(run, 60)) == run
    assert run_of("r", {"host": "h"}) is None
    odd = {"started_at": run.started_at, "images_per_second": "fast", "completed": "x", "seconds": 3}
    assert run_of("r", odd) == Run(id="r", started_at=run.started_at, host="", status="")
