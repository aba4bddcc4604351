"""Claims are kept alive while they are held, and given back as soon as they are not."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from tests.clock import Clock, Turns, elapse
from text2img.databases import Collections, NewPrompt, Selection, open_database
from text2img.errors import DatabaseFailed
from text2img.prompts import Claim, PromptId, RequestedParameters
from text2img.worker.leases import Leases

LEASE = 60


@pytest.fixture
def database(tmp_path):
    """A real database with two prompts."""
    made = open_database(f"sqlite:///{tmp_path}/prompts.db", Collections())
    made.runs.enqueue(
        NewPrompt(id=PromptId("int", str(n)), text="a cat", requested=RequestedParameters()) for n in (1, 2)
    )
    yield made
    made.close()


@pytest.fixture
def turns(tmp_path):
    """The waits between extensions, each of which lets its seconds pass for the database."""
    return Turns(Clock(partial(elapse, tmp_path / "prompts.db")))


def test_a_held_claim_outlives_its_lease(database, turns):
    """Twice the lease later nobody else gets the prompts; once they are given back, anybody does."""
    beats = []
    with Leases(database.queue, LEASE, lambda: beats.append(1), wait=turns) as leases:
        leases.hold(prompt.claim for prompt in database.queue.claim("w1", 2, LEASE, Selection()))
        turns.grant(7)  # of a third of a lease each
        assert database.queue.claim("w2", 2, 60, Selection()) == []
    assert len(beats) == 7
    assert len(database.queue.claim("w2", 2, 60, Selection())) == 2


@pytest.mark.parametrize("recorded", [True, False])
def test_a_stall_is_the_death_of_what_was_on_the_device(database, recorded):
    """What is given back after a stall gets a death if it was in the batch on the device: not what was only
    claimed, had left the device, or is recorded.
    """
    first, second = (prompt.claim for prompt in database.queue.claim("w1", 2, 60, Selection()))
    leases = Leases(database.queue, 60, lambda: None)
    leases.hold([first, second])
    leases.mark_on_device([first])
    leases.mark_on_device([second])
    if recorded:
        leases.forget([second])
    leases.release(stalled=True)
    deaths = {prompt.id: prompt.deaths for prompt in database.queue.peek(2, Selection())}
    assert deaths == ({first.id: 0} if recorded else {first.id: 0, second.id: 1})


def test_what_was_dropped_is_not_given_back(database):
    """Leaving gives back only what is still held: what is done with stays as it was recorded."""
    prompts = database.queue.claim("w1", 2, 60, Selection())
    with Leases(database.queue, 60, lambda: None) as leases:
        leases.hold(prompt.claim for prompt in prompts)
        leases.forget([prompts[0].claim])
    assert database.queue.holds(prompts[0].claim)
    assert not database.queue.holds(prompts[1].claim)


def test_a_database_that_is_away_for_a_moment_is_asked_again():
    """A failed extension does not end the keeping; the next turn extends."""
    asked, extended, clock = [], [], Clock()
    turns = Turns(clock)

    class Flaky:
        def extend(self, claims, seconds):
            asked.append(claims)
            if len(asked) == 1:
                raise DatabaseFailed("away")
            extended.append(claims)
            return []

        def release(self, claims):
            raise DatabaseFailed("away again")

    claim = Claim(PromptId("int", "1"), "w1", 1)
    with Leases(Flaky(), LEASE, lambda: None, wait=turns) as leases:
        leases.hold([claim])
        turns.grant(2)
    assert extended == [[claim]]
    assert clock.pauses == [LEASE / 3] * 2


def test_a_database_that_says_nothing_does_not_hold_up_the_end(monkeypatch, caplog):
    """Neither an extension nor a release that never comes back is waited for, and the log says so."""
    monkeypatch.setattr("text2img.worker.leases._JOIN_TIMEOUT", 0.1)
    monkeypatch.setattr("text2img.worker.leases._RELEASE_TIMEOUT", 0.1)
    asked, end = threading.Event(), threading.Event()

    class NullProgress:
        def extend(self, claims, seconds):
            asked.set()
            end.wait()
            return []

        def release(self, claims):
            end.wait()

    with Leases(NullProgress(), 0.05, lambda: None) as held:
        held.hold([Claim(PromptId("int", "1"), "w1", 1)])
        asked.wait()
    end.set()
    assert "1 prompts could not be released" in caplog.text


def test_a_beat_that_fails_costs_no_claim(database, turns):
    """Whatever goes wrong in saying that the run is alive: the leases are extended all the same."""
    beats = []

    def beat():
        beats.append(1)
        raise RuntimeError("a library that is not all there yet")

    with Leases(database.queue, LEASE, beat, wait=turns) as leases:
        leases.hold(prompt.claim for prompt in database.queue.claim("w1", 2, LEASE, Selection()))
        turns.grant(7)
        assert database.queue.claim("w2", 2, 60, Selection()) == []
    assert len(beats) == 7


def test_a_lost_claim_counts_once(database):
    """However many notice that it went to another worker; one that was dropped before does not count."""
    leases = Leases(database.queue, 60, lambda: None)
    lost, done = (prompt.claim for prompt in database.queue.claim("w1", 2, 60, Selection()))
    leases.hold([lost, done])
    leases.forget([done])
    for _ in range(2):
        leases.mark_lost([lost, done])
    assert leases.lost == 1
    assert not leases.holds(lost)
