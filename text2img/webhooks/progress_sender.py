"""Sends progress beside the work: by threads of its own, the newest alone, and never twice at once for one
generation, so that it arrives in order. Knows no HTTP.
"""

from __future__ import annotations

import threading
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from text2img.prompts.webhook_urls import Webhook

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from text2img.webhooks.milestones import Reached

    Generation = tuple[str, str]  # the webhook's address and the generation's id
    Wait = Callable[[threading.Condition, Callable[[], object], float], object]

_THREADS: Final = 16
_PER_ORIGIN: Final = 8
"""Requests to one backend at a time, so that one that hangs leaves room for the others."""
_MOST: Final = 1_000
"""So many generations wait at the most; of more, those that have waited longest are dropped."""
_LINGERING: Final = 10.0
"""Seconds that a thread waits for more before it ends."""


class Beside:
    """``send(address, generation_id, milestone)`` may take its time, and must not raise.

    ``wait_for(condition, predicate, seconds)`` waits until the predicate is true, for so long at most.
    """

    def __init__(
        self, send: Callable[[str, str, Reached], None], wait_for: Wait = threading.Condition.wait_for
    ) -> None:
        self._send, self._wait_for = send, wait_for
        self._waiting: dict[Generation, list[Reached]] = {}
        self._sending: set[Generation] = set()
        self._busy: Counter[str] = Counter()  # requests under way, by origin
        lock = threading.Lock()
        self._there_is_more, self._sent = threading.Condition(lock), threading.Condition(lock)
        self._lock = lock
        self._threads = 0
        self._idle = 0

    def put(self, address: str, generation_id: str, reached: Sequence[Reached]) -> None:
        """Have the milestones of one step sent. Should the backend still be at an earlier one, those in
        between are dropped; they are not where only our own threads are late.
        """
        generation = (address, generation_id)
        with self._lock:
            behind = generation in self._sending or self._busy[_origin(address)] >= _PER_ORIGIN
            waiting = [] if behind else self._waiting.get(generation, [])
            self._waiting[generation] = [*waiting, *reached]
            if len(self._waiting) > _MOST:
                del self._waiting[next(iter(self._waiting))]
            if self._idle < len(self._waiting) and self._threads < _THREADS:
                self._threads += 1
                threading.Thread(target=self._work, name="progress", daemon=True).start()
            self._there_is_more.notify()

    def finish(self, address: str, generation_id: str, seconds: float) -> None:
        """Wait until all that was put for the generation is sent, for so long at the most; drop the rest."""
        generation = (address, generation_id)
        with self._lock:
            self._wait_for(
                self._sent,
                lambda: generation not in self._waiting and generation not in self._sending,
                seconds,
            )
            self._waiting.pop(generation, None)

    def _work(self) -> None:
        while taken := self._take():
            generation, reached = taken
            self._send(*generation, reached)
            with self._lock:
                self._sending.discard(generation)
                self._busy.subtract([_origin(generation[0])])
                self._busy += Counter()  # forgets whoever has none under way
                self._there_is_more.notify()
                self._sent.notify_all()

    def _take(self) -> tuple[Generation, Reached] | None:
        """What is sent next; None, and a thread less, where there is nothing for a while."""
        with self._lock:
            self._idle += 1
            self._wait_for(self._there_is_more, self._next, _LINGERING)
            generation = self._next()
            self._idle -= 1
            if generation is None:
                self._threads -= 1
                return None
            self._sending.add(generation)
            self._busy[_origin(generation[0])] += 1
            first, *others = self._waiting.pop(generation)
            if others:
                self._waiting[generation] = others
            return generation, first

    def _next(self) -> Generation | None:
        """The one that has waited longest and may be sent now."""
        for generation in self._waiting:
            if generation not in self._sending and self._busy[_origin(generation[0])] < _PER_ORIGIN:
                return generation
        return None


@lru_cache(maxsize=_MOST)
def _origin(address: str) -> str:
    return Webhook.of(address).origin
