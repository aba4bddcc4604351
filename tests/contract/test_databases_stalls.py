"""Prompts that stalled the device, on every database."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("before", [None, 3, 2.0, -1, "many"])
def test_a_stall_counts_as_a_death(stand, before):
    """After a stall, a prompt is pending at once with one death more, once, whatever stood there."""
    stand.put({"_id": 1} if before is None else {"_id": 1, "deaths": before})
    prompt = stand.claim_one("a")
    stand.database.queue.start([prompt.claim])
    stand.database.queue.release_stalled([prompt.claim])
    stand.database.queue.release_stalled([prompt.claim])
    found = stand.get(1)
    assert (found["status"], found["deaths"]) == ("pending", prompt.deaths + 1)
    assert not {"claimed_by", "lease_expires_at", "started_claim", "claim_token"} & set(found)
    again = stand.claim_one("b")
    assert (again.claim.number, again.deaths, again.attempts) == (2, prompt.deaths + 1, 0)


def test_a_stall_of_a_lost_claim_changes_nothing(stand):
    """The holder's document stays as it is, and no claims are no error."""
    stand.put({"_id": 1})
    stale, holder = stand.claim_one("a", lease=0), stand.claim_one("b")
    before = stand.get(1)
    stand.database.queue.release_stalled([stale.claim])
    stand.database.queue.release_stalled([])
    assert stand.get(1) == before
    assert stand.database.queue.holds(holder.claim)
