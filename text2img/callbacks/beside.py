"""Sends progress beside the work: by threads of its own, the newest alone, and never twice at once for one
generation, so that it arrives in order. Knows no HTTP.
"""

from __future__ import annotations

import threading
from collections import Counter
from typing import TYPE_CHECKING, Final

from text2img.prompts.webhooks import Webhook

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from text2img.callbacks.milestones import Reached

    Generation = tuple[str, str]  # the webhook's address and the generation's id

_THREADS: Final = 16
_PER_ORIGIN: Final = 8
"""Requests to one backend at a time, so that one that hangs leaves room for the others."""
_MOST: Final = 1_000
"""So many generations wait at the most; of more, those that have waited longest are dropped."""
_LINGERING: Final = 10.0
"""Seconds that a thread waits for more before it ends."""


class Beside:
    """``send(address, generation_id, milestone)`` may take its time, and must not raise."""

    def __init__(self, send: Callable[[str, str, Reached], None]) -> None:
        self._send = send
        self._waiting: dict[Generation, list[Reached]] = {}
        self._sending: set[Generation] = set()
        self._changed = threading.Condition()
        self._threads = 0
        self._idle = 0

    def put(self, address: str, generation_id: str, reached: Sequence[Reached]) -> None:
        """Have the milestones of one step sent; those of earlier steps that still wait are dropped."""
        with self._changed:
            self._waiting[address, generation_id] = list(reached)
            if len(self._waiting) > _MOST:
                del self._waiting[next(iter(self._waiting))]
            if not self._idle and self._threads < _THREADS:
                self._threads += 1
                threading.Thread(target=self._work, name="progress", daemon=True).start()
            self._changed.notify_all()

    def finish(self, address: str, generation_id: str, seconds: float) -> None:
        """Wait until all that was put for the generation is sent, for so long at the most; drop the rest."""
        generation = (address, generation_id)
        with self._changed:
            self._changed.wait_for(
                lambda: generation not in self._waiting and generation not in self._sending, seconds
            )
            self._waiting.pop(generation, None)

    def _work(self) -> None:
        while taken := self._take():
            generation, reached = taken
            self._send(*generation, reached)
            with self._changed:
                self._sending.discard(generation)
                self._changed.notify_all()

    def _take(self) -> tuple[Generation, Reached] | None:
        """What is sent next; None, and a thread less, where there is nothing for a while."""
        with self._changed:
            self._idle += 1
            generation = self._changed.wait_for(self._next, _LINGERING)
            self._idle -= 1
            if generation is None:
                self._threads -= 1
                return None
            self._sending.add(generation)
            first, *others = self._waiting.pop(generation)
            if others:
                self._waiting[generation] = others
            return generation, first

    def _next(self) -> Generation | None:
        """The one that has waited longest and may be sent now."""
        busy = Counter(Webhook.of(address).origin for address, _ in self._sending)
        for generation in self._waiting:
            room = busy[Webhook.of(generation[0]).origin] < _PER_ORIGIN
            if room and generation not in self._sending:
                return generation
        return None
