"""Sends progress beside the work: by threads of its own, the newest alone, and never twice at once for one
generation, so that it arrives in order. Knows no HTTP.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeVar

from text2img.prompts.webhook_urls import Webhook

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from text2img.prompts import Claim, Outcome, Prompt, Request


if TYPE_CHECKING:
    Generation = tuple[str, str]  # the webhook's address and the generation's id
    Wait = Callable[[threading.Condition, Callable[[], object], float], object]

_THREADS: Final = 16
_PER_ORIGIN: Final = 8
"""Requests to one backend at a time, so that one that hangs leaves room for the others."""
_MOST: Final = 1_000
"""So many generations wait at the most; of more, those that have waited longest are dropped."""
_LINGERING: Final = 10.0
"""Seconds that a thread waits for more before it ends."""


class ProgressSender:
    """``send(address, generation_id, milestone)`` may take its time, and must not raise.

    ``wait_for(condition, predicate, seconds)`` waits until the predicate is true, for so long at most.
    """

    def __init__(
        self, send: Callable[[str, str, ProgressUpdate], None], wait_for: Wait = threading.Condition.wait_for
    ) -> None:
        self._send, self._wait_for = send, wait_for
        self._waiting: dict[Generation, list[ProgressUpdate]] = {}
        self._sending: set[Generation] = set()
        self._busy: Counter[str] = Counter()  # requests under way, by origin
        lock = threading.Lock()
        self._there_is_more, self._sent = threading.Condition(lock), threading.Condition(lock)
        self._lock = lock
        self._threads = 0
        self._idle = 0

    def put(self, address: str, generation_id: str, reached: Sequence[ProgressUpdate]) -> None:
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

    def _take(self) -> tuple[Generation, ProgressUpdate] | None:
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


if TYPE_CHECKING:
    Send = Callable[[str, str, Sequence["ProgressUpdate"]], None]

MILESTONES: Final = (0, 25, 50, 75, 90)
"""In percent of a prompt's steps."""
_REMEMBERED: Final = 1_000
"""So many shapes, and prompts with pictures to come, are remembered at the most."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    """A milestone (percent), and the step of ``of`` at which it was reached. ``left``: seconds, if known."""

    percent: int
    step: int
    of: int
    left: float | None


def reached(before: int, now: int, of: int) -> list[int]:
    """The milestones that lie beyond step ``before`` (−1: not begun) and not beyond step ``now`` of ``of``.

    Over the steps of a try each milestone comes once, in order: several at once where a step passes several.
    """
    return [percent for percent in MILESTONES if before * 100 < percent * of <= now * 100]


@dataclass(slots=True)
class _Pictures:
    """A prompt's pictures in the batch on the device: ``earlier`` steps were made in batches before."""

    prompt: Prompt
    pictures: int
    earlier: int
    of: int
    told: int

    def left(self, done: int, steps: int) -> int:
        """Steps of batches that are still to be made: of this one, and of those with the rest."""
        rest = self.of - self.earlier - self.pictures * steps
        return steps - done + math.ceil(rest / max(1, self.pictures * steps)) * steps


class Milestones:
    """Hears of a run's progress (see Progress) and hands on the milestones of prompts that have a webhook.

    ``send(webhook, generation_id, milestones)`` is called on the device's thread and must not wait.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._on_device: list[_Pictures] = []
        self._earlier: dict[Claim, int] = {}  # of prompts whose pictures come in several batches
        self._pace: dict[Hashable, float] = {}  # seconds a step, by shape and size of the batch
        self._lock = threading.Lock()
        self._kind: Hashable = None
        self._steps = 1
        self._begun = 0.0
        self._first: tuple[int, float] | None = None

    def begin(self, total: int | None) -> None:
        """A run begins: nothing to tell."""

    def batch(self, requests: Sequence[Request]) -> None:
        """This batch goes on the device: 0 %, for prompts of which it is the first."""
        self._steps = requests[0].parameters.num_inference_steps
        self._kind = (requests[0].shape, len(requests))
        self._begun, self._first = time.monotonic(), None
        with self._lock:
            self._on_device = self._followed(requests)
        self._tell(0, self._pace.get(self._kind))

    def step(self, done: int, of: int) -> None:
        """The batch has made ``done`` of its steps, which an engine may count in another unit."""
        now, done, of = time.monotonic(), done * self._steps // max(1, of), self._steps
        first, began = self._first = self._first or (done, now)
        # The first step pays for reading the texts, and on some devices for getting ready.
        if done > first:
            pace = (now - began) / (done - first)
        else:
            pace = self._pace.get(self._kind, (now - self._begun) / max(1, done))
        self._tell(done, pace)
        if done == of > first:
            _remember(self._pace, self._kind, pace)

    def settled(self, outcomes: Sequence[Outcome]) -> None:
        """What is recorded is followed no more."""
        with self._lock:
            for outcome in outcomes:
                self._earlier.pop(outcome.claim, None)

    def end(self) -> None:
        """The work is over."""

    def _followed(self, requests: Sequence[Request]) -> list[_Pictures]:
        prompts = {each.prompt.claim: each for each in requests if each.prompt.webhook_url is not None}
        here = Counter(each.prompt.claim for each in requests)
        followed = []
        for claim, request in prompts.items():
            earlier, of = self._earlier.get(claim, 0), _pictures(request) * self._steps
            followed.append(_Pictures(request.prompt, here[claim], earlier, of, told=earlier or -1))
            _remember(self._earlier, claim, earlier + here[claim] * self._steps)
        return followed

    def _tell(self, done: int, pace: float | None) -> None:
        for each in self._on_device:
            step = min(each.of, each.earlier + each.pictures * done)
            left = None if pace is None else round(each.left(done, self._steps) * pace, 1)
            told = [
                ProgressUpdate(percent, step, each.of, left) for percent in reached(each.told, step, each.of)
            ]
            each.told = max(each.told, step)
            if told:
                self._send(str(each.prompt.webhook_url), str(each.prompt.id), told)


def _pictures(request: Request) -> int:
    """How many pictures the request's prompt gets."""
    return request.pictures


def _remember(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Remember it as the latest, and forget the oldest where it is one too many."""
    known.pop(key, None)
    known[key] = value
    if len(known) > _REMEMBERED:
        del known[next(iter(known))]
