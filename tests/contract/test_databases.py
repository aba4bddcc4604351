"""The queue, on every database: claiming, holding, giving back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from tests.contract.database_suite import ALL, MINUTE, failed, postponed, texts
from tests.outcomes import completed
from text2img.databases import Selection
from text2img.prompts import Claim, PromptId


def test_claims_each_prompt_once(stand):
    """What one worker has claimed no other gets, and a claim beyond the last prompt is empty."""
    stand.put(*({"_id": n} for n in range(5)))
    first, second = stand.claim("a", 3), stand.claim("b", 3)
    assert texts(first) + texts(second) == ["0", "1", "2", "3", "4"]
    assert stand.claim("c") == []


def test_nothing_is_claimed_from_an_empty_database(stand):
    """An empty queue, and a limit of none, give an empty list."""
    assert stand.claim() == []
    stand.put({"_id": 1})
    assert stand.claim(limit=0) == []


def test_a_claim_marks_the_document(stand):
    """Status, worker, number and lease stand in the document; the owner's fields stay as they were."""
    stand.put({"_id": 1, "text": "a boat", "mine": "kept", "priority": 2})
    prompt = stand.claim_one("w")
    found = stand.get(1)
    assert prompt.claim == Claim(PromptId("int", "1"), "w", 1)
    assert (found["status"], found["claimed_by"], found["claim_number"]) == ("processing", "w", 1)
    assert "lease_expires_at" in found
    assert (found["text"], found["mine"], found["priority"]) == ("a boat", "kept", 2)


def test_a_worker_named_like_a_field_is_taken_literally(stand):
    """A worker's name that starts with a dollar sign is a name."""
    stand.put({"_id": 1})
    prompt = stand.claim_one("$text")
    assert stand.get(1)["claimed_by"] == "$text"
    assert stand.database.queue.holds(prompt.claim)


def test_the_highest_priority_goes_first(stand):
    """By priority descending, absent being 0, then by id; a priority that is no number counts as 0."""
    stand.put({"_id": 1}, {"_id": 2, "priority": 5}, {"_id": 3, "priority": -1}, {"_id": 4, "priority": 0})
    stand.put({"_id": 5, "priority": 0.5}, {"_id": 6, "priority": 5})
    assert texts(stand.claim(limit=4)) == ["2", "6", "5", "1"]
    assert texts(stand.claim()) == ["4", "3"]


def test_a_priority_of_the_wrong_type_starves_nobody(stand):
    """A prompt whose priority is a text is claimed as well, and counts as priority 0."""
    stand.put({"_id": 1, "priority": "high"}, {"_id": 2})
    prompts = stand.claim()
    assert sorted(texts(prompts)) == ["1", "2"]
    assert {prompt.priority for prompt in prompts} == {0}


def test_text_and_wishes_arrive_unchecked(stand):
    """Whatever the owner wrote reaches the prompt as it stands."""
    stand.put(
        {"_id": 1, "text": 7, "width": "wide", "seed": -1, "num_inference_steps": "30", "scheduler": "x"}
    )
    prompt = stand.claim_one()
    assert prompt.text == 7
    assert (prompt.requested.width, prompt.requested.seed, prompt.requested.scheduler) == ("wide", -1, "x")
    assert prompt.requested.num_inference_steps == "30"


@pytest.mark.parametrize("status", ["pending", None])
def test_an_absent_status_is_pending(stand, status):
    """A document without a status, or with a null one, is claimed like a pending one."""
    stand.put({"_id": 1, "status": status}, {"_id": 2})
    assert len(stand.claim()) == 2


@pytest.mark.parametrize("status", ["completed", "error", "paused"])
def test_other_statuses_are_left_alone(stand, status):
    """What is done, failed, or set aside by its owner is not claimable."""
    stand.put({"_id": 1, "status": status})
    assert stand.claim() == []
    assert stand.database.queue.pending(ALL) == 0


def test_a_postponed_prompt_waits(stand):
    """Before its not_before a prompt is not claimable; after it, it is; a claim forgets it."""
    soon, past = datetime.now(UTC) + timedelta(hours=1), datetime.now(UTC) - timedelta(hours=1)
    kept = str if stand.backend.kind == "sqlite" else (lambda moment: moment)
    stand.put({"_id": 1, "not_before": kept(soon)}, {"_id": 2, "not_before": kept(past)})
    assert stand.database.queue.postponed(ALL) == 1
    assert texts(stand.claim()) == ["2"]
    assert "not_before" not in stand.get(2)


def test_an_expired_lease_is_claimed_again_with_a_greater_number(stand):
    """A lease that has run out makes the prompt claimable; the first claim is void from then on."""
    stand.put({"_id": 1})
    first = stand.claim_one("a", lease=0)
    second = stand.claim_one("b")
    assert (first.claim.number, second.claim.number) == (1, 2)
    assert not stand.database.queue.holds(first.claim)
    assert stand.database.queue.holds(second.claim)


def test_pending_goes_before_expired(stand):
    """Pending prompts are claimed before those whose lease ran out, even of a higher priority."""
    stand.put({"_id": 1, "priority": 9})
    stand.claim_one(lease=0)
    stand.put({"_id": 2}, {"_id": 3})
    assert texts(stand.claim(limit=2)) == ["2", "3"]
    assert texts(stand.claim(limit=2)) == ["1"]


def test_processing_without_a_lease_counts_as_expired(stand):
    """A prompt that another program left in processing is not lost for ever."""
    stand.put({"_id": 1, "status": "processing"})
    assert texts(stand.claim()) == ["1"]


def test_a_death_counts_only_after_start(stand):
    """Only a worker that died with the prompt on the device is counted against the prompt."""
    stand.put({"_id": 1})
    stand.claim_one("a", lease=0)
    second = stand.claim_one("b", lease=0)
    assert second.deaths == 0
    stand.database.queue.start([second.claim])
    third = stand.claim_one("c", lease=0)
    assert third.deaths == 1
    fourth = stand.claim_one("d", lease=0)  # the third had not started
    assert fourth.deaths == 1
    stand.database.queue.start([fourth.claim])
    assert stand.claim_one("e").deaths == 2


def test_what_has_left_the_device_counts_no_death(stand):
    """A worker that dies with its next batch on the device died neither of the one before, though that is
    not recorded yet, nor of what another worker has on its own.
    """
    stand.put({"_id": 1}, {"_id": 2}, {"_id": 3})
    before, poison = stand.claim_one("a", lease=0), stand.claim_one("a", lease=0)
    others = stand.claim_one("b", lease=0)
    stand.database.queue.start([before.claim])
    stand.database.queue.start([others.claim])
    stand.database.queue.start([poison.claim], left=[before.claim])
    again = {prompt.text: prompt.deaths for prompt in stand.claim("c", limit=3)}
    assert again == {before.text: 0, poison.text: 1, others.text: 1}


def test_a_release_counts_no_death(stand):
    """Given back after its start, the prompt is pending at once, unchanged but for its number."""
    stand.put({"_id": 1})
    prompt = stand.claim_one("a")
    stand.database.queue.start([prompt.claim])
    stand.database.queue.release([prompt.claim])
    stand.database.queue.release([prompt.claim])
    found = stand.get(1)
    assert found["status"] == "pending"
    assert not {"claimed_by", "lease_expires_at", "started_claim", "claim_token"} & set(found)
    again = stand.claim_one("b")
    assert (again.claim.number, again.deaths, again.attempts) == (2, 0, 0)


def test_the_leases_of_the_dead_run_out_at_once(stand):
    """What a dead worker held can be claimed, with its death where its batch had started; the living keep
    theirs, and a second time there is nothing to do.
    """
    stand.put({"_id": 1}, {"_id": 2}, {"_id": 3})
    started, waiting = stand.claim("$dead", limit=2)
    living = stand.claim_one("alive")
    stand.database.queue.start([started.claim])
    assert stand.database.queue.release_dead("$dead") == 2
    assert stand.database.queue.holds(started.claim)
    assert {prompt.id.text: prompt.deaths for prompt in stand.claim("next")} == {"1": 1, "2": 0}
    assert stand.database.queue.release_dead("$dead") == 0
    assert stand.database.queue.holds(living.claim)
    assert not stand.database.queue.holds(waiting.claim)


def test_extend_keeps_the_lease_and_names_the_lost(stand):
    """Leases of held claims run on; the claims that are lost come back."""
    stand.put({"_id": 1}, {"_id": 2})
    kept, lost = (prompt.claim for prompt in stand.claim("a", lease=0))
    stand.backend.change(1, {"lease_expires_at": None})  # so that it is claimable, and 2 is as well
    assert stand.database.queue.extend([kept], MINUTE) == []
    assert texts(stand.claim("b")) == ["2"]
    assert stand.database.queue.extend([kept, lost], MINUTE) == [lost]
    assert stand.claim("c") == []


def test_extend_can_let_a_lease_run_out(stand):
    """The lease runs from now on, also when that is shorter than before."""
    stand.put({"_id": 1})
    prompt = stand.claim_one("a")
    assert stand.database.queue.extend([prompt.claim], 0) == []
    assert stand.claim_one("b").claim.number == 2


def test_empty_sequences_do_nothing(stand):
    """No claims and no outcomes are no error."""
    stand.database.queue.start([])
    stand.database.queue.release([])
    assert stand.database.queue.extend([], MINUTE) == []
    assert stand.record() == []


def test_a_stale_claim_changes_nothing(stand):
    """Start, extend, release and record of a lost claim leave the holder's document as it is."""
    stand.put({"_id": 1})
    stale, holder = stand.claim_one("a", lease=0), stand.claim_one("b")
    before = stand.get(1)
    stand.database.queue.start([stale.claim])
    stand.database.queue.release([stale.claim])
    assert stand.database.queue.extend([stale.claim], MINUTE) == [stale.claim]
    assert stand.record(failed(stale), postponed(stale), completed(stale)) == []
    assert stand.get(1) == before
    assert stand.database.queue.holds(holder.claim)


def test_the_same_worker_name_is_fenced_by_number(stand):
    """A worker that claims its own expired prompt again holds only the later claim."""
    stand.put({"_id": 1})
    first, second = stand.claim_one("w", lease=0), stand.claim_one("w")
    assert not stand.database.queue.holds(first.claim)
    assert stand.database.queue.holds(second.claim)


def test_an_expired_claim_holds_until_somebody_takes_it(stand):
    """As long as nobody else has claimed it, the late worker may still finish."""
    stand.put({"_id": 1})
    prompt = stand.claim_one(lease=0)
    assert stand.database.queue.holds(prompt.claim)
    assert len(stand.record(completed(prompt))) == 1


def test_pending_counts_what_can_be_claimed(stand):
    """Pending and expired count; live leases and postponed ones do not."""
    stand.put(*({"_id": n} for n in range(4)))
    stand.claim("a", 1, 0)
    stand.claim("a", 1)
    assert stand.database.queue.pending(ALL) == 3
    (prompt,) = stand.claim("b", 1)
    stand.record(postponed(prompt, 3600))
    assert (stand.database.queue.pending(ALL), stand.database.queue.postponed(ALL)) == (2, 1)


@pytest.mark.parametrize(
    ("document", "waits"),
    [
        ({}, True),
        ({"status": "processing"}, True),
        ({"status": "completed"}, False),
        ({"dataset_id": "autumn"}, False),
    ],
)
def test_a_look_for_work(stand, document, waits):
    """There is some where something pending or expired can be claimed, of the data set that is asked for."""
    stand.put({"_id": 1, "dataset_id": "spring", **document})
    assert stand.database.queue.has_claimable(Selection("spring")) is waits
    if waits:
        stand.claim("a")
        assert not stand.database.queue.has_claimable(Selection("spring"))


@pytest.mark.parametrize(("asked", "ids"), [("7", ["1", "2"]), ("spring", ["3"]), ("8", []), ("2.5", ["4"])])
def test_a_selection_matches_text_and_number(stand, asked, ids):
    """A data set's id matches as text and as the number it reads as."""
    stand.put({"_id": 1, "dataset_id": 7}, {"_id": 2, "dataset_id": "7"}, {"_id": 3, "dataset_id": "spring"})
    stand.put({"_id": 4, "dataset_id": 2.5}, {"_id": 5})
    selection = Selection(asked)
    assert stand.database.queue.pending(selection) == len(ids)
    assert texts(stand.claim(selection=selection)) == ids


def test_peeking_changes_nothing(stand):
    """What a claim would give is seen in its order, pending before expired, and stays as it is."""
    stand.put({"_id": 1}, {"_id": 2, "priority": 1}, {"_id": 3, "status": "completed"})
    stand.claim("a", 1, 0)
    before = [stand.get(n) for n in (1, 2, 3)]
    assert texts(stand.database.queue.peek(10, ALL)) == ["1", "2"]
    assert texts(stand.database.queue.peek(1, ALL)) == ["1"]
    assert stand.database.queue.peek(0, ALL) == []
    assert [stand.get(n) for n in (1, 2, 3)] == before
