"""The servers that LoRAs come from, where they were too slow: they are left alone for a while."""

from __future__ import annotations

import threading
import time
from typing import Final

from text2img.storage.bucket import TransientError

SLOW_ORIGIN_WAITS: Final = (60.0, 600.0)
"""Seconds for which an origin that was too slow is not asked again: at first, and at most, doubling."""


class SourceTooSlow(TransientError):  # noqa: N818 - as its base class
    """A source sends too little, or nothing, for too long."""


class SlowOrigins:
    """The origins (a web server, a bucket, the hub) that are not asked for a while; thread-safe.

    What is too slow occupies a thread until it is given up. So an origin is left alone after that, for a time
    that doubles while it stays slow; others are not affected.
    """

    def __init__(self) -> None:
        self._waits: dict[str, tuple[float, float]] = {}  # until when, and for how long, by origin
        self._lock = threading.Lock()

    def check(self, origin: str) -> None:
        """Raise SourceTooSlow if the origin is to be left alone now."""
        with self._lock:
            until, _ = self._waits.get(origin, (0.0, 0.0))
        left = until - time.monotonic()
        if left > 0:
            raise SourceTooSlow(f"its server was too slow, and is not asked again for {left:.0f} s")

    def failed(self, origin: str) -> None:
        """Note that the origin was too slow."""
        with self._lock:
            until, wait = self._waits.get(origin, (0.0, 0.0))
            if time.monotonic() < until:  # several requests at once count as one
                return
            wait = min(max(SLOW_ORIGIN_WAITS[0], 2 * wait), SLOW_ORIGIN_WAITS[1])
            self._waits[origin] = time.monotonic() + wait, wait

    def succeeded(self, origin: str) -> None:
        """Note that the origin has sent a file."""
        with self._lock:
            self._waits.pop(origin, None)
