"""The claims a worker holds, kept alive in the background and given back when it leaves.

Knows claims and the database's queue; does not know what is done with a prompt.
"""

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

_LAST_TURN = 2.0  # seconds that an extension which is under way may still take once the block is left
_GIVING_BACK = 5.0  # seconds: a database that is away must not hold up the end of the run


class Leases:
    """Extends the leases of all held claims every third of their length, also while the device is busy.

    ``beat`` is called just as often: it says that the run is alive. Leaving the ``with`` block releases
    what is still held, at once; should the database be away, that is given up after a few seconds. ``lost``
    counts claims that went to other workers. ``wait(event, seconds)`` waits for an event, and returns whether
    it is set.
    """

    def __init__(
        self,
        queue: Queue,
        seconds: float,
        beat: Callable[[], None],
        *,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self.seconds = seconds
        self._queue = queue
        self._beat = beat
        self._wait = wait
        self.lost = 0
        self._held: set[Claim] = set()
        self._lock = threading.Lock()
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._leave.set()
        self._thread.join(_LAST_TURN)
        self.release()

    def hold(self, claims: Iterable[Claim]) -> None:
        """Keep these alive from now on."""
        with self._lock:
            self._held.update(claims)

    def holds(self, claim: Claim) -> bool:
        """Whether the claim is held, as far as is known here: the database has the last word."""
        with self._lock:
            return claim in self._held

    def forget(self, claims: Iterable[Claim]) -> None:
        """These are done with, or lost."""
        with self._lock:
            self._held.difference_update(claims)

    def mark_lost(self, claims: Iterable[Claim]) -> None:
        """These are other workers' now; those that were held count as ``lost``, once."""
        with self._lock:
            gone = self._held.intersection(claims)
            self._held -= gone
            self.lost += len(gone)

    def release(self) -> None:
        """Give back all that is held. Should the database be away, the leases run out by themselves."""
        with self._lock:
            claims = sorted(self._held, key=lambda claim: claim.id.name)
            self._held.clear()
        if not claims:
            return
        try:
            run_with_timeout(_GIVING_BACK, partial(self._queue.release, claims))
            log.info("released %d claimed prompts", len(claims), extra={"released": len(claims)})
        except (DatabaseFailed, TimeoutError) as exc:
            log.warning(
                "%d prompts could not be released; they are free again in %g s: %s",
                len(claims),
                self.seconds,
                exc,
            )

    def _keep(self) -> None:
        while not self._wait(self._leave, self.seconds / 3):
            with self._lock:
                claims = list(self._held)
            try:
                lost = self._queue.extend(claims, self.seconds) if claims else []
                if not self._leave.is_set():  # the run's end may be written down by now
                    self._beat()
            except Exception as exc:
                # Whatever it was, claims must be kept alive. Should it last, the flow meets it, and decides.
                log.warning("the leases could not be extended: %s", exc, exc_info=exc)
                continue
            with self._lock:
                lost = [claim for claim in lost if claim in self._held]  # the rest was done with meanwhile
            if lost:
                self.mark_lost(lost)
                log.warning("%d claims were lost to other workers", len(lost), extra={"lost": len(lost)})
