"""Outcomes, on every database: what is written down, under which claim, and what a repetition does."""

from __future__ import annotations

import json
from datetime import datetime

import pytest

from tests.contract.database_suite import ALL, failed, postponed, texts
from tests.outcomes import completed
from text2img.errors import ErrorCode
from text2img.prompts import Evaluation, Failed

_CLAIM = {"claimed_by", "claim_token", "lease_expires_at", "started_claim"}


def _moment(value):
    return value if isinstance(value, datetime) else datetime.fromisoformat(value)


def test_a_completed_prompt_says_what_was_made(stand):
    """Where the picture is, what it was made with and by which run; nothing of the claim is left."""
    stand.put({"_id": 1, "seed": 7, "mine": "kept", "negative_prompt": "$blurry"})
    prompt = stand.claim_one()
    done = completed(prompt, image_url="gs://b/1.png")
    assert stand.record(done) == [done]
    found = stand.get(1)
    assert (found["status"], found["image_url"], found["run_id"]) == ("completed", "gs://b/1.png", "run-1")
    assert (found["sha256"], found["mine"], found["seed"]) == ("ab" * 32, "kept", 7)
    assert _moment(found["completed_at"]).tzinfo
    assert found["used"] == {
        "seed": 7,
        "num_inference_steps": 20,
        "guidance_scale": 7.5,
        "width": 512,
        "height": 512,
        "scheduler": "euler",
        "negative_prompt": "$blurry",
        "model": "m",
    }
    assert not (_CLAIM | {"untold", "error", "not_before"}) & set(found)
    assert stand.claim() == []


def test_a_result_says_the_same_flat(stand):
    """One result for the prompt, by its id, with the parameters used beside the rest."""
    stand.put({"_id": "p", "text": "$5 boats"})
    stand.record(completed(stand.claim_one(), image_url="gs://b/p.png", truncated=True))
    found = stand.result("p")
    assert (found["prompt"], found["image_url"], found["gcs_url"]) == ("$5 boats", *["gs://b/p.png"] * 2)
    assert (found["status"], found["model"], found["run_id"]) == ("completed", "m", "run-1")
    assert (found["width"], found["height"], found["num_inference_steps"]) == (512, 512, 20)
    assert (found["guidance_scale"], found["scheduler"], found["negative_prompt"]) == (7.5, "euler", "")
    assert (bool(found["prompt_truncated"]), found["claim_number"]) == (True, 1)
    assert isinstance(found["seed"], int)
    assert _moment(found["created_at"]).tzinfo


def test_several_pictures_stand_in_order(stand):
    """All URLs beside the first one's, in the prompt and in the result, and how many and what was asked for;
    made again with one picture, neither says anything of several.
    """
    signed = "https://b.example/ink.safetensors?X-Amz-Signature=5ecret"
    stand.put({"_id": 1, "num_images": 3, "aspect_ratio": "1:2", "lora": [{"path": signed, "weight": 0.5}]})
    prompt, urls = stand.claim_one(), ("gs://b/1.png", "gs://b/1~1.png", "gs://b/1~2.png")
    stand.record(completed(prompt, image_url=urls[0], image_urls=urls))
    found, result = stand.get(1), stand.result(1)
    shown = {"path": "https://b.example/ink.safetensors", "weight": 0.5}
    for each, used in ((found, found["used"]), (result, result)):
        assert (each["image_url"], each["image_urls"]) == (urls[0], list(urls))
        assert (used["num_images"], used["aspect_ratio"], used["loras"]) == (3, "1:2", [shown])
        assert (used["width"], used["height"]) == (512, 1024)
    assert found["lora"] == [{"path": signed, "weight": 0.5}]
    assert "5ecret" not in str((found["used"], result))
    changed = {"status": "pending", "num_images": None, "aspect_ratio": None, "lora": None}
    stand.backend.change(1, changed)
    stand.record(completed(stand.claim_one()))
    found, result = stand.get(1), stand.result(1)
    assert not {"image_urls", "num_images", "aspect_ratio", "loras"} & {*found, *found["used"], *result}


def test_a_failure_forgets_all_pictures(stand):
    """A prompt that was made and then failed shows none of its earlier URLs."""
    stand.put({"_id": 1, "num_images": 2})
    stand.record(completed(stand.claim_one(), image_urls=("a", "b")))
    stand.backend.change(1, {"status": "pending"})
    stand.record(failed(stand.claim_one()))
    assert not {"image_url", "image_urls", "used"} & stand.get(1).keys()


def test_tags_stand_for_a_text(stand):
    """Where there is no text the tags, joined by spaces, are what is drawn and told of; else the text is."""
    tags = ["a red", "boat", "$5"]
    stand.put({"_id": 1, "text": None, "prompt_tags": tags}, {"_id": 2, "prompt_tags": tags})
    stand.record(*map(completed, stand.claim()), notify=True)
    assert [stand.result(n)["prompt"] for n in (1, 2)] == ["a red boat $5", "a boat"]
    assert stand.get(1)["prompt_tags"] == tags
    told, _ = stand.database.outbox.collect("run-1", "n1", 10)
    assert [one.text for one in told] == ["a red boat $5", "a boat"]


def test_several_pictures_are_told_of(stand):
    """What waits to be told holds every URL, in order; nothing of several for a prompt with one."""
    stand.put({"_id": 1, "num_images": 2}, {"_id": 2})
    one, two = stand.claim()
    stand.record(completed(one, image_urls=("gs://b/1.png", "gs://b/1~1.png")), completed(two), notify=True)
    told, _ = stand.database.outbox.collect("run-1", "n1", 10)
    assert [each.image_urls for each in told] == [("gs://b/1.png", "gs://b/1~1.png"), ()]


def test_a_picture_elsewhere_has_no_gcs_url(stand):
    """Only a gs:// URL stands as gcs_url."""
    stand.put({"_id": 1})
    stand.record(completed(stand.claim_one(), image_url="/pictures/1.png"))
    assert stand.result(1).get("gcs_url") is None


def test_a_failed_prompt_says_why(stand):
    """Code, sentence, time and attempts stand in the document; no result is written."""
    stand.put({"_id": 1})
    prompt = stand.claim_one()
    assert len(stand.record(failed(prompt))) == 1
    found = stand.get(1)
    assert (found["status"], found["error"], found["error_code"]) == ("error", "$it was flagged", "safety")
    assert (found["attempts"], found["run_id"]) == (1, "run-1")
    assert _moment(found["error_at"]).tzinfo
    assert not _CLAIM & set(found)
    assert stand.backend.count("dataset_records") == 0


def test_a_postponed_prompt_comes_back_with_its_attempts(stand):
    """Pending again once its wait is over, with one more attempt and the reason kept."""
    stand.put({"_id": 1}, {"_id": 2})
    first, second = stand.claim()
    assert len(stand.record(postponed(first, 0), postponed(second, 3600))) == 2
    assert stand.get(1)["status"] == "pending"
    assert not _CLAIM & set(stand.get(1))
    assert stand.database.queue.postponed(ALL) == 1
    again = stand.claim()
    assert texts(again) == ["1"]
    assert again[0].attempts == 1
    stand.record(completed(again[0]))
    assert not {"attempts", "error", "error_code", "error_at"} & set(stand.get(1))


def test_mixed_outcomes_are_all_written(stand):
    """A batch's outcomes of every kind go in together, in the order they came."""
    stand.put(*({"_id": n} for n in range(3)))
    one, two, three = stand.claim()
    outcomes = [completed(one), failed(two), postponed(three, 60)]
    assert stand.record(*outcomes) == outcomes
    assert [stand.get(n)["status"] for n in range(3)] == ["completed", "error", "pending"]


def test_recording_again_is_harmless(stand):
    """A repetition counts as written and changes nothing; there is one result still."""
    stand.put(*({"_id": n} for n in range(3)))
    one, two, three = stand.claim()
    outcomes = [completed(one), failed(two), postponed(three, 60)]
    stand.record(*outcomes)
    before = [stand.get(n) for n in range(3)]
    assert stand.record(*outcomes) == outcomes
    assert [stand.get(n) for n in range(3)] == before
    assert stand.backend.count("dataset_records") == 1


def test_only_lost_claims_are_dropped(stand):
    """Of a batch of which one claim was lost, the rest is written."""
    stand.put({"_id": 1}, {"_id": 2})
    mine, lost = stand.claim("a", lease=0)
    stand.database.queue.extend([mine.claim], 60)
    stand.claim_one("b")
    kept = completed(mine)
    assert stand.record(kept, completed(lost)) == [kept]
    assert (stand.get(1)["status"], stand.get(2)["status"]) == ("completed", "processing")


def test_a_result_of_a_greater_claim_stays(stand):
    """A late worker never overwrites what a later claim has made."""
    stand.put({"_id": 1})
    late, holder = stand.claim_one("a", lease=0), stand.claim_one("b")
    assert len(stand.record(completed(holder, model="new"))) == 1
    assert stand.record(completed(late, model="old")) == []
    assert stand.record(failed(late)) == []
    assert (stand.result(1)["model"], stand.result(1)["claim_number"]) == ("new", 2)
    assert stand.get(1)["used"]["model"] == "new"


def test_a_late_picture_of_a_prompt_that_failed_meanwhile_leaves_no_result(stand):
    """A worker slept while another's try failed for good: what it made is dropped, its result as well."""
    stand.put({"_id": 1})
    late, holder = stand.claim_one("a", lease=0), stand.claim_one("b")
    stand.record(failed(holder))
    assert stand.record(completed(late)) == []
    assert (stand.get(1)["status"], stand.backend.count("dataset_records")) == ("error", 0)


def test_a_later_claim_replaces_the_result(stand):
    """A prompt that is put back and done again has one result: the new one."""
    stand.put({"_id": 1})
    stand.record(completed(stand.claim_one(), model="old"))
    stand.backend.change(1, {"status": "pending"})
    assert len(stand.record(completed(stand.claim_one(), model="new"))) == 1
    assert stand.result(1)["model"] == "new"
    assert stand.backend.count("dataset_records") == 1


def test_approximations_and_a_base_stand_where_they_were_on(stand):
    """They are told of in the prompt and in the result, and gone from both when it is made again without."""
    on = {"feature_cache": 3, "autoencoder": "./tiny", "model_base": "owner/base"}
    stand.put({"_id": 1})
    stand.record(completed(stand.claim_one(), **on))
    assert on.items() <= stand.get(1)["used"].items()
    assert on.items() <= stand.result(1).items()
    stand.backend.change(1, {"status": "pending"})
    stand.record(completed(stand.claim_one(), feature_cache=5))
    assert (stand.get(1)["used"]["feature_cache"], stand.result(1)["feature_cache"]) == (5, 5)
    assert "autoencoder" not in {**stand.get(1)["used"], **stand.result(1)}
    stand.backend.change(1, {"status": "pending"})
    stand.record(completed(stand.claim_one()))
    assert not on.keys() & {**stand.get(1)["used"], **stand.result(1)}.keys()


def test_style_is_recorded_where_it_was_asked_for(stand):
    """Signature and format stand in ``used`` and in the result, as used; the next picture's say its own."""
    style = {
        "artist_name": " Ana Díaz ",
        "signature_opacity": 200.0,
        "image_format": "webp",
        "image_quality": 80,
    }
    stand.put({"_id": 1, **style})
    stand.record(completed(stand.claim_one()))
    expected = {**style, "artist_name": "Ana Díaz", "signature_opacity": 200}
    used = stand.get(1)["used"]
    assert {name: used.get(name) for name in style} == expected
    assert {name: stand.result(1).get(name) for name in style} == expected
    stand.backend.change(
        1, {"status": "pending", "artist_name": "", "image_format": "png", "image_quality": 80}
    )
    stand.record(completed(stand.claim_one()))
    assert not {"artist_name", "signature_opacity"} & set(stand.get(1)["used"])
    assert not {"artist_name", "signature_opacity"} & set(stand.result(1))
    assert stand.result(1)["image_format"] == "png"


def test_a_result_older_than_claims_is_replaced(stand):
    """A result that another program left, without a claim number, does not stand in the way."""
    stand.put({"dataset_id": 1, "prompt": "old"}, table="dataset_records")
    stand.put({"_id": 1})
    assert len(stand.record(completed(stand.claim_one()))) == 1
    assert stand.result(1)["prompt"] == "a boat"


def test_a_prompt_put_back_without_its_number_is_done_in_the_end(stand):
    """An owner who removed the job's fields meets a result with a greater number once, not for ever."""
    stand.put({"_id": 1}, {"_id": 2})
    stand.put({"dataset_id": 1, "claim_number": 8}, table="dataset_records")
    first, other = stand.claim()
    beside = completed(other)
    assert stand.record(completed(first), beside) == [beside]
    again = stand.claim_one()
    assert again.claim.number == 9
    assert len(stand.record(completed(again))) == 1
    assert stand.result(1)["claim_number"] == 9


def test_failing_after_a_success_leaves_no_stale_picture(stand):
    """A prompt done once, put back and failed says nothing of the earlier picture any more."""
    stand.put({"_id": 1})
    stand.record(completed(stand.claim_one()))
    stand.backend.change(1, {"status": "pending"})
    stand.record(failed(stand.claim_one()))
    assert not {"image_url", "completed_at", "used"} & set(stand.get(1))


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_error_code_is_kept(stand, code):
    """Each code stands as its own word."""
    stand.put({"_id": 1})
    stand.record(Failed(prompt=stand.claim_one(), code=code, message="no", attempts=2))
    assert stand.get(1)["error_code"] == code.value
    assert dict(stand.database.runs.counts(ALL).errors) == {code.value: 1}


def test_what_an_evaluator_said_is_recorded(stand):
    """Score and words stand in the prompt and its result; a retry without an evaluator takes them away."""
    stand.put({"_id": 1})
    seen = Evaluation(evaluator="demo", score=0.75, matches=("red",), missing=("a star",))
    stand.record(
        completed(
            stand.claim_one(), image_urls="ab", evaluations=(seen, Evaluation(evaluator="demo", error="no"))
        )
    )
    for found in (stand.get(1), stand.result(1)):
        assert found["score"] == 0.75
        said = found["evaluation"]
        said = json.loads(said) if isinstance(said, str) else said
        assert said == {"evaluator": "demo", "score": 0.75, "matches": ["red"], "missing": ["a star"]}
        scores = found["scores"]
        assert (json.loads(scores) if isinstance(scores, str) else scores) == [0.75, None]
    stand.backend.change(1, {"status": "pending"})
    stand.record(completed(stand.claim_one()))
    assert not {"score", "scores", "evaluation"} & (set(stand.get(1)) | set(stand.result(1)))
