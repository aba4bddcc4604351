"""Waiting for what must happen, and not a moment longer."""

from __future__ import annotations

import time


def until(condition, seconds, what):
    """The condition's value once it is true; an error that says what did not happen in that time."""
    limit = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > limit:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.01)
    return value
