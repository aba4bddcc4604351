"""The hashes of a prompt's images: whatever becomes of the prompt, the next claim knows them all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.contract.database_suite import failed
from tests.outcomes import completed, iterated
from text2img.databases import NewPrompt, Selection
from text2img.prompts import PromptId, RequestedParameters

FIRST, SECOND, THIRD, FOURTH = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)


def _new(text, **requested):
    return NewPrompt(id=PromptId("str", "p"), text=text, requested=RequestedParameters(**requested))


def _done(prompt, *hashes):
    """The prompt completed with one image for each hash."""
    done = completed(prompt, image_urls=[f"gs://b/{number}.png" for number, _ in enumerate(hashes)])
    images = zip(done.images, hashes, strict=True)
    return replace(done, images=tuple(replace(image, sha256=sha256) for image, sha256 in images))


def _tried(prompt, sha256):
    """The prompt after one more iteration, whose image has that hash."""
    outcome = iterated(prompt)
    return replace(outcome, tries=(*outcome.tries[:-1], replace(outcome.tries[-1], sha256=sha256)))


@pytest.fixture
def enqueued(stand):
    """A database with one prompt, ``p``."""
    stand.database.runs.enqueue([_new("a boat")])
    return stand


def test_a_new_prompt_has_none(enqueued):
    """Nothing was recorded for it, so its worker may replace nothing."""
    assert enqueued.claim_one().recorded_hashes == ()


def test_a_changed_prompt_keeps_the_hash_of_its_image(enqueued):
    """Made, changed, made, changed: the third claim has both hashes, and the document lists both."""
    enqueued.record(_done(enqueued.claim_one(), FIRST))
    assert "sha256s" not in enqueued.get("p")
    assert enqueued.database.runs.requeue_changed([_new("a ship")]) == 1
    second = enqueued.claim_one()
    assert second.recorded_hashes == (FIRST,)
    enqueued.record(_done(second, SECOND))
    assert (enqueued.get("p")["sha256"], enqueued.get("p")["sha256s"]) == (SECOND, [FIRST, SECOND])
    assert enqueued.database.runs.requeue_changed([_new("a raft")]) == 1
    assert enqueued.claim_one().recorded_hashes == (FIRST, SECOND)


def test_a_failure_after_a_success_keeps_it(enqueued):
    """Made, changed, failed, reset by ``retry``: the hash of the image that is still stored is there."""
    enqueued.record(_done(enqueued.claim_one(), FIRST))
    enqueued.database.runs.requeue_changed([_new("a ship")])
    enqueued.record(failed(enqueued.claim_one()))
    assert enqueued.database.runs.retry(None, Selection()) == 1
    assert enqueued.claim_one().recorded_hashes == (FIRST,)


def test_each_image_of_a_prompt_has_its_own(enqueued):
    """Three images, then one, then three again: the hashes of the second and third are not forgotten."""
    enqueued.record(_done(enqueued.claim_one(), FIRST, SECOND, THIRD))
    enqueued.database.runs.requeue_changed([_new("a ship", num_images=1)])
    prompt = enqueued.claim_one()
    assert set(prompt.recorded_hashes) == {FIRST, SECOND, THIRD}
    enqueued.record(_done(prompt, FOURTH))
    enqueued.database.runs.requeue_changed([_new("a ship", num_images=3)])
    assert set(enqueued.claim_one().recorded_hashes) == {FIRST, SECOND, THIRD, FOURTH}


def test_an_iteration_is_known_after_the_loop_begins_again(enqueued):
    """A loop whose prompt is changed in its middle, and one that failed, keep the hashes of their tries."""
    enqueued.record(_tried(enqueued.claim_one(), FIRST))
    enqueued.record(_tried(enqueued.claim_one(), SECOND))
    assert enqueued.database.runs.requeue_changed([_new("a ship")]) == 1
    prompt = enqueued.claim_one()
    assert (prompt.tries, set(prompt.recorded_hashes)) == ((), {FIRST, SECOND})
    enqueued.record(_tried(prompt, THIRD))
    enqueued.record(failed(enqueued.claim_one()))
    enqueued.database.runs.retry(None, Selection())
    assert set(enqueued.claim_one().recorded_hashes) == {FIRST, SECOND, THIRD}


def test_a_worker_that_died_takes_none_away(enqueued):
    """A lease that expires, a release and an owner who sets the prompt to pending change no hash."""
    enqueued.record(_done(enqueued.claim_one(), FIRST, SECOND))
    enqueued.backend.change("p", {"status": "pending"})
    assert set(enqueued.claim_one("dead", lease=0).recorded_hashes) == {FIRST, SECOND}
    prompt = enqueued.claim_one("next")
    assert set(prompt.recorded_hashes) == {FIRST, SECOND}
    enqueued.database.queue.release([prompt.claim])
    assert set(enqueued.claim_one("last").recorded_hashes) == {FIRST, SECOND}


@pytest.mark.parametrize(
    "left",
    [
        {"sha256": 7, "sha256s": "all"},
        {"sha256": FIRST.upper(), "sha256s": [7, None, [FIRST], {"sha256": FIRST}, "a" * 65]},
        {"sha256s": {"0": FIRST}, "tries": [7, {"sha256": 5}, {"best": True}]},
    ],
)
def test_what_an_owner_left_there_is_no_hash(stand, left):
    """Fields of any other form are read as none, and are replaced by those of the next image."""
    stand.put({"_id": "p", **left})
    prompt = stand.claim_one()
    assert prompt.recorded_hashes == ()
    stand.record(_done(prompt, FIRST, SECOND))
    assert stand.get("p")["sha256s"] == [FIRST, SECOND]


def test_no_history_grows_without_an_end(stand):
    """Of many hashes the latest thousand are kept, those of the last images among them."""
    stand.put({"_id": "p", "sha256s": [f"{number:064x}" for number in range(3000)]})
    prompt = stand.claim_one()
    assert prompt.recorded_hashes == tuple(f"{number:064x}" for number in range(2000, 3000))
    stand.record(_done(prompt, FIRST, SECOND))
    assert stand.get("p")["sha256s"][-3:] == [f"{2999:064x}", FIRST, SECOND]
    assert len(stand.get("p")["sha256s"]) == 1000
