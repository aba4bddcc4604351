"""The leases of a worker's claims: renewed in the background, released when the worker ends."""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import TYPE_CHECKING, Self

from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import DatabaseFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from text2img.databases import Queue
    from text2img.prompts import Claim

log = logging.getLogger(__name__)

_JOIN_TIMEOUT = 2.0  # seconds that an extension under way may still take once the block is left
_RELEASE_TIMEOUT = 5.0  # seconds: an unavailable database must not hold up the end of the run


class Leases:
    """The claims that a worker holds, each with a lease of ``seconds``.

    A thread extends the leases every third of their duration, also while the device is busy. ``heartbeat`` is
    called just as often, to mark the run as alive. Leaving the ``with`` block releases what is still held at
    once; if the database is unavailable, it stops trying after a few seconds. ``lost`` counts claims that
    went to other workers. ``wait(event, seconds)`` waits for an event, and returns whether it is set.
    """

    def __init__(
        self,
        queue: Queue,
        seconds: float,
        heartbeat: Callable[[], None],
        *,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self.seconds = seconds
        self._queue = queue
        self._heartbeat = heartbeat
        self._wait = wait
        self.lost = 0
        self._held: set[Claim] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        self._thread.join(_JOIN_TIMEOUT)
        self.release()

    def hold(self, claims: Iterable[Claim]) -> None:
        """Extend the leases of these claims from now on."""
        with self._lock:
            self._held.update(claims)

    def holds(self, claim: Claim) -> bool:
        """Return True if the claim is held as far as this worker knows; the database is authoritative."""
        with self._lock:
            return claim in self._held

    def forget(self, claims: Iterable[Claim]) -> None:
        """Stop extending the leases of claims that are done or lost."""
        with self._lock:
            self._held.difference_update(claims)

    def mark_lost(self, claims: Iterable[Claim]) -> None:
        """Drop claims that other workers now hold; those that were held count as ``lost``, once."""
        with self._lock:
            lost = self._held.intersection(claims)
            self._held -= lost
            self.lost += len(lost)

    def release(self) -> None:
        """Release all held claims. If the database is unavailable, the leases expire by themselves."""
        with self._lock:
            claims = sorted(self._held, key=lambda claim: claim.id.name)
            self._held.clear()
        if not claims:
            return
        try:
            run_with_timeout(_RELEASE_TIMEOUT, partial(self._queue.release, claims))
            log.info("released %d claimed prompts", len(claims), extra={"released": len(claims)})
        except (DatabaseFailed, TimeoutError) as exc:
            log.warning(
                "%d prompts could not be released; their leases expire in %g s: %s",
                len(claims),
                self.seconds,
                exc,
            )

    def _run(self) -> None:
        while not self._wait(self._closed, self.seconds / 3):
            with self._lock:
                claims = list(self._held)
            try:
                lost = self._queue.extend(claims, self.seconds) if claims else []
                if not self._closed.is_set():  # the run's end may be recorded by now
                    self._heartbeat()
            except Exception as exc:
                # Keep extending, whatever the error. If it persists, the worker meets it and fails the run.
                log.warning("the leases could not be extended: %s", exc, exc_info=exc)
                continue
            with self._lock:
                lost = [claim for claim in lost if claim in self._held]  # the others are done since
            if lost:
                self.mark_lost(lost)
                log.warning("%d claims were lost to other workers", len(lost), extra={"lost": len(lost)})
