"""A clock that goes on by what is waited, and by nothing else: a test looks at the pauses."""

from __future__ import annotations


class Clock:
    """In place of the module ``time``, or of its ``monotonic`` and ``sleep``; ``pauses`` lists the latter."""

    def __init__(self):
        self.pauses = []
        self._now = 1_000.0  # seconds

    def monotonic(self):
        """Return the seconds since some moment."""
        return self._now

    def sleep(self, seconds):
        """Note the pause and let it have passed."""
        self.pauses.append(seconds)
        self._now += seconds
