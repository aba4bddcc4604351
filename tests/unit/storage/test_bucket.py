"""What all buckets share: how often, and after which pauses, a request is tried again."""

from __future__ import annotations

import pytest

from text2img.storage.bucket import TransientError, retry


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
