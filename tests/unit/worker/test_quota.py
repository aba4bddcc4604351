"""What a run may still claim, and when its own retries come due."""

from __future__ import annotations

from tests.clock import Clock
from text2img.prompts.batching import ClaimBudget


def test_a_limit_counts_what_was_claimed() -> None:
    """No more than the limit, however many are wanted; without one, as many as are wanted."""
    quota = ClaimBudget(7, 100)
    assert quota.take(5) == 5
    quota.claimed(5)
    assert (quota.take(5), quota.remaining()) == (2, 2)
    assert ClaimBudget(None, 0).take(5) == 5


def test_what_was_put_back_may_be_claimed_again() -> None:
    """A prompt that is tried again does not count twice, and its place is no other's until it is due."""
    quota = ClaimBudget(3, 100)
    quota.claimed(3)
    quota.requeued([8.0, 2.0])
    assert quota.take(5) == 0
    quota.next_retry_at()
    assert quota.take(5) == 1
    quota.next_retry_at()
    assert quota.take(5) == 2


def test_a_retry_that_is_due_already_is_not_forgotten() -> None:
    """However late in the run the next is put back: what came due meanwhile can still be claimed."""
    clock = Clock()
    quota = ClaimBudget(None, 10, clock=clock)
    quota.requeued([2.0])
    clock.advance(7)
    quota.requeued([8.0])
    assert [quota.next_retry_at(), quota.next_retry_at()] == [clock.now - 5, clock.now + 8]


def test_what_is_unclaimed_never_falls_below_none() -> None:
    """More may come than there were at the start."""
    quota = ClaimBudget(None, 3)
    quota.claimed(5)
    assert quota.remaining() == 0


def test_the_next_retry_comes_due_when_it_said() -> None:
    """The earliest first; what is past by then is forgotten with it, what comes later is not."""
    clock = Clock()
    quota = ClaimBudget(None, 10, clock=clock)
    clock.advance(0.25)
    quota.requeued([8.0, 2.0, 2.0])
    due = [quota.next_retry_at(), quota.next_retry_at(), quota.next_retry_at()]
    assert due == [clock.now + 2.75, clock.now + 8.75, None]  # no sooner, and by whole seconds
    quota.requeued([2.0, 8.0])
    clock.advance(60)
    assert quota.next_retry_at() == clock.now - 57.25
    assert quota.next_retry_at() is None


def test_retries_take_no_memory_a_prompt() -> None:
    """Ten thousand prompts that are put back in the same seconds are remembered by those seconds."""
    quota = ClaimBudget(None, 10_000)
    for _ in range(10_000):
        quota.requeued([2.0])
    assert len(quota._due) < 100


def test_a_shared_limit_is_asked_for() -> None:
    """Only what is missing is asked for, what was granted and not claimed is kept, and nothing beyond it is
    claimed.
    """
    left, asked = [12], []

    def more(wanted: int) -> int:
        asked.append(wanted)
        granted = min(wanted, left[0])
        left[0] -= granted
        return granted

    quota = ClaimBudget(12, 100, more)
    assert quota.take(10) == 10
    quota.claimed(4)
    assert quota.take(5) == 5
    quota.claimed(5)
    assert quota.take(10) == 3
    assert asked == [10, 9]
