"""Prompts that are drawn several times: what an iteration leaves in the database, on every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.contract.database_suite import ALL, failed, postponed
from tests.outcomes import completed, iterated
from text2img.databases import NewPrompt
from text2img.prompts import AwaitsScore, Evaluation, PromptId, RequestedParameters

_LOOP = {"tries", "iterations", "next_prompt"}


def done(prompt, *, best):
    """The prompt completed with that one of its tries."""
    again = iterated(prompt)
    result = completed(prompt)
    image = again.tries[best]
    return replace(result, images=(image,), tries=again.tries, iterations=again.iterations)


def test_an_iteration_is_there_for_the_next_claim(stand):
    """Pending at once, whoever claims it next has every try and the text to draw; no attempt is counted."""
    stand.put({"_id": 1, "text": "a boat"})
    stand.record(postponed(stand.claim_one(), 0))
    first = iterated(stand.claim_one())
    assert stand.record(first, notify=True) == [first]
    found = stand.get(1)
    assert (found["status"], found["iterations"], found["next_prompt"]) == ("pending", 1, "$a boat, red")
    assert not {"claimed_by", "lease_expires_at", "attempts", "error", "untold", "image_url"} & found.keys()
    assert stand.result(1) is None
    prompt = stand.claim_one()
    assert (prompt.tries, prompt.next_prompt, prompt.attempts) == (first.tries, "$a boat, red", 0)


def test_a_completed_loop_links_its_tries(stand):
    """The best picture is the result, whichever iteration made it; prompt and result list every try."""
    stand.put({"_id": 1, "text": "a boat"})
    stand.record(iterated(stand.claim_one(), 0.75))
    stand.record(done(stand.claim_one(), best=0), notify=True)
    for found in (stand.get(1), stand.result(1)):
        assert (found["image_url"], found["score"], found["iterations"]) == ("gs://b/0.png", 0.75, 2)
        assert [(one["iteration"], one.get("best", False)) for one in found["tries"]] == [
            (1, True),
            (2, False),
        ]
        assert [one["score"] for one in found["tries"]] == [0.75, 0.5]
    assert "next_prompt" not in stand.get(1)
    told, _ = stand.database.outbox.collect("run-1", "n1", 10)
    assert [(one.iterations, one.score, one.image_url) for one in told] == [(2, 0.75, "gs://b/0.png")]


def test_a_text_that_was_refined_is_known_beside_the_owners(stand):
    """The result's prompt is the owner's; what was drawn instead stands as refined_prompt."""
    stand.put({"_id": 1, "text": "a boat"})
    result = done(stand.claim_one(), best=0)
    (image,) = result.images
    stand.record(replace(result, images=(replace(image, text="a red boat"),)))
    assert (stand.result(1)["prompt"], stand.result(1)["refined_prompt"]) == ("a boat", "a red boat")
    assert (stand.get(1)["text"], stand.get(1)["used"]["refined_prompt"]) == ("a boat", "a red boat")


def test_nothing_of_a_loop_outlives_it(stand):
    """Made again without one, failed for good, or changed by its owner: the tries are gone."""
    for number, resolve_parameters in ((1, completed), (2, failed)):
        stand.put({"_id": number, "text": "a boat"})
        stand.record(iterated(stand.claim_one()))
        stand.record(resolve_parameters(stand.claim_one()))
        assert not _LOOP & stand.get(number).keys()
    stand.put({"_id": "p", "text": "a boat"})
    stand.record(iterated(stand.claim_one()))
    changed = NewPrompt(id=PromptId("str", "p"), text="two boats", requested=RequestedParameters())
    assert stand.database.runs.requeue_changed([changed]) == 1
    assert not _LOOP & stand.get("p").keys()


def test_a_loop_that_has_ended_is_not_gone_on_with(stand):
    """A completed prompt that its owner puts back is drawn anew, however many tries it had: they neither add
    up nor count against it.
    """
    stand.put({"_id": 1, "text": "a boat"})
    stand.record(iterated(stand.claim_one()))
    stand.record(done(stand.claim_one(), best=0))
    stand.backend.change(1, {"status": "pending"})
    prompt = stand.claim_one()
    assert (prompt.tries, prompt.next_prompt) == ((), None)


def test_an_iteration_whose_claim_is_lost_is_not_written(stand):
    """Who was too slow leaves no tries behind; a repetition of what was written is recognised."""
    stand.put({"_id": 1, "text": "a boat"})
    slow = stand.claim_one()
    stand.database.queue.release([slow.claim])
    assert stand.record(iterated(slow)) == []
    first = iterated(stand.claim_one())
    assert stand.record(first) == [first]
    assert stand.record(first) == [first]
    assert stand.database.runs.counts(ALL).pending == 1


@pytest.mark.parametrize("left", ["nonsense", 7, ["x"], [{"iteration": 1}], {"a": 1}])
def test_tries_that_another_program_wrote_are_none(stand, left):
    """Whatever stands there that no loop wrote, the prompt is claimed, and begins anew."""
    stand.put({"_id": 1, "text": "a boat", "tries": left, "next_prompt": 3})
    prompt = stand.claim_one()
    assert (prompt.tries, prompt.next_prompt) == ((), None)


def test_images_that_wait_for_a_score_come_back(stand):
    """Pending at once, with the images as they were; neither attempts nor hashes are lost, and the outcome
    that follows removes them.
    """
    stand.put({"_id": 1, "attempts": 1, "webhook_url": "http://backend.example"})
    first = stand.claim_one()
    images = completed(first).images
    judged = replace(images[0], number=1, evaluation=Evaluation(evaluator="e", score=0.5))
    stand.record(AwaitsScore(prompt=first, text="a boat", images=(*images, judged)))
    again = stand.claim_one("w2")
    assert again.unscored == (*images, judged)
    assert (again.attempts, again.recorded_hashes) == (1, (images[0].sha256,))
    assert stand.database.outbox.pending_webhooks(9) == []
    stand.record(completed(again))
    assert not stand.get(1).get("unscored_images")
