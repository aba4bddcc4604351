"""What all buckets share: how often, and after which pauses, a request is tried again."""

from __future__ import annotations

import pytest

from tests.clock import Clock
from text2img.errors import Stopped
from text2img.storage.bucket import PermanentError, TransientError, retry


def test_pauses_between_tries_grow_to_their_end():
    """Each pause is at most twice the one before, half of it or more, and none is longer than 16 s."""
    pauses = []

    def attempt(limit):
        if len(pauses) < 8:
            raise TransientError("busy")
        return "stored"

    assert retry(attempt, retry_timeout=1000, timeout=5, sleep=pauses.append) == "stored"
    for pause, most in zip(pauses, (0.5, 1, 2, 4, 8, 16, 16, 16), strict=True):
        assert most / 2 <= pause <= most


def test_what_does_not_get_better_is_raised_after_the_timeout():
    """A pause that would outlast the retry timeout is not waited for: what the service said comes out."""
    pauses = []

    def attempt(limit):
        raise TransientError("busy")

    with pytest.raises(TransientError, match="busy"):
        retry(attempt, retry_timeout=0, timeout=5, sleep=pauses.append)
    assert pauses == []


def test_no_attempt_starts_after_the_timeout():
    """The retries end before the wait that would pass the timeout; the last error is raised as it is."""
    clock, errors, limits = Clock(), [], []

    def attempt(limit):
        limits.append((clock.now, limit))
        errors.append(TransientError(f"busy {len(errors)}"))
        raise errors[-1]

    with pytest.raises(TransientError) as raised:
        retry(attempt, retry_timeout=20, timeout=5, sleep=clock.sleep, clock=clock)
    assert raised.value is errors[-1]
    assert len(errors) == len(clock.pauses) + 1 >= 5
    assert clock.now <= 1020
    assert [limit for _, limit in limits] == [min(5, max(1, 1020 - now)) for now, _ in limits]


def test_a_rejection_is_not_retried():
    """A PermanentError comes out of the first attempt, unchanged."""
    rejection, pauses = PermanentError(403, "no"), []

    def attempt(limit):
        raise rejection

    with pytest.raises(PermanentError) as raised:
        retry(attempt, retry_timeout=60, timeout=5, sleep=pauses.append)
    assert raised.value is rejection
    assert pauses == []


def test_a_stop_ends_the_retries():
    """An exception from the sleep comes out at once, without another attempt."""
    limits = []

    def attempt(limit):
        limits.append(limit)
        raise TransientError("busy")

    def sleep(seconds):
        raise Stopped(15)

    with pytest.raises(Stopped):
        retry(attempt, retry_timeout=60, timeout=5, sleep=sleep)
    assert len(limits) == 1
