"""Send progress milestones to prompts' own webhooks, from background threads.

Each generation has one request at a time, so that updates arrive in order. While one is under way only the
latest step waits behind it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, TypeVar

from text2img.prompts.ids import Webhook
from text2img.prompts.quoting import json_text

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from text2img.prompts import Claim, Outcome, Prompt, Request


if TYPE_CHECKING:
    Generation = tuple[str, str]  # the webhook's address, and the generation's id as JSON
    Wait = Callable[[threading.Condition, Callable[[], object], float], object]

_MAX_THREADS: Final = 16
_MAX_REQUESTS_PER_ORIGIN: Final = 8
"""Requests to one backend at a time, so that one that hangs leaves threads for the others."""
_MAX_WAITING: Final = 1_000
"""Generations that may wait; beyond that, those that have waited longest are dropped."""
_IDLE_TIMEOUT: Final = 10.0
"""Seconds that a thread waits for more updates before it ends."""


class ProgressSender:
    """Background sender of progress updates.

    ``send(address, generation_id, update)`` may take its time, and must not raise. A ``generation_id`` is
    JSON, so that 500 and "500" are two generations.
    ``wait_for(condition, predicate, seconds)`` waits until the predicate is true, for at most ``seconds``.
    """

    def __init__(
        self, send: Callable[[str, str, ProgressUpdate], None], wait_for: Wait = threading.Condition.wait_for
    ) -> None:
        self._send, self._wait_for = send, wait_for
        self._waiting: dict[Generation, list[ProgressUpdate]] = {}
        self._sending: set[Generation] = set()
        self._busy: Counter[str] = Counter()  # requests under way, by origin
        lock = threading.Lock()
        self._work_available, self._sent = threading.Condition(lock), threading.Condition(lock)
        self._lock = lock
        self._threads = 0
        self._idle_threads = 0

    def put(self, address: str, generation_id: str, updates: Sequence[ProgressUpdate]) -> None:
        """Enqueue the updates of one step.

        While the backend is still busy with earlier updates, those that wait are replaced. They are kept if
        only our own threads are late.
        """
        generation = (address, generation_id)
        with self._lock:
            backend_is_late = (
                generation in self._sending or self._busy[_origin(address)] >= _MAX_REQUESTS_PER_ORIGIN
            )
            waiting = [] if backend_is_late else self._waiting.get(generation, [])
            self._waiting[generation] = [*waiting, *updates]
            if len(self._waiting) > _MAX_WAITING:
                del self._waiting[next(iter(self._waiting))]
            if self._idle_threads < len(self._waiting) and self._threads < _MAX_THREADS:
                self._threads += 1
                threading.Thread(target=self._run, name="progress", daemon=True).start()
            self._work_available.notify()

    def finish(self, address: str, generation_id: str, timeout: float) -> None:
        """Wait until the generation's updates are sent, for at most ``timeout`` seconds; drop the rest."""
        generation = (address, generation_id)
        with self._lock:
            self._wait_for(
                self._sent,
                lambda: generation not in self._waiting and generation not in self._sending,
                timeout,
            )
            self._waiting.pop(generation, None)

    def _run(self) -> None:
        while taken := self._take():
            generation, update = taken
            self._send(*generation, update)
            with self._lock:
                self._sending.discard(generation)
                self._busy.subtract([_origin(generation[0])])
                self._busy += Counter()  # removes the origins without a request under way
                self._work_available.notify()
                self._sent.notify_all()

    def _take(self) -> tuple[Generation, ProgressUpdate] | None:
        """Return the next update to send; None, with this thread counted out, if none comes for a while."""
        with self._lock:
            self._idle_threads += 1
            self._wait_for(self._work_available, self._next_generation, _IDLE_TIMEOUT)
            generation = self._next_generation()
            self._idle_threads -= 1
            if generation is None:
                self._threads -= 1
                return None
            self._sending.add(generation)
            self._busy[_origin(generation[0])] += 1
            first, *others = self._waiting.pop(generation)
            if others:
                self._waiting[generation] = others
            return generation, first

    def _next_generation(self) -> Generation | None:
        """Return the generation that has waited longest, of those that may be sent now."""
        for generation in self._waiting:
            if (
                generation not in self._sending
                and self._busy[_origin(generation[0])] < _MAX_REQUESTS_PER_ORIGIN
            ):
                return generation
        return None


@lru_cache(maxsize=_MAX_WAITING)
def _origin(address: str) -> str:
    return Webhook.of(address).origin


if TYPE_CHECKING:
    Send = Callable[[str, str, Sequence["ProgressUpdate"]], None]

MILESTONES: Final = (0, 25, 50, 75, 90)
"""In percent of a prompt's steps."""
_MAX_REMEMBERED: Final = 1_000
"""Batch shapes, and prompts with more images to come, that are remembered."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class ProgressUpdate:
    """A milestone (percent), and the step of ``total_steps`` at which it was reached.

    ``seconds_left``: the estimate, rounded up; 0 if it is unknown.
    """

    percent: int
    step: int
    total_steps: int
    seconds_left: int


def milestones_between(before: int, now: int, total_steps: int) -> list[int]:
    """Return the milestones after step ``before`` (-1: not begun), up to step ``now`` of ``total_steps``.

    Over the steps of an attempt each milestone comes once, in order; one step may pass several.
    """
    return [percent for percent in MILESTONES if before * 100 < percent * total_steps <= now * 100]


@dataclass(slots=True)
class _PromptInBatch:
    """A prompt's images in the batch on the device.

    ``earlier_steps`` were made in batches before; milestones up to ``reported_step`` have been sent.
    """

    prompt: Prompt
    images: int
    earlier_steps: int
    total_steps: int
    reported_step: int

    def steps_left(self, done: int, steps: int) -> int:
        """Return the steps of batches that are still to come: of this one, and of those with the rest."""
        rest = self.total_steps - self.earlier_steps - self.images * steps
        return steps - done + math.ceil(rest / max(1, self.images * steps)) * steps


class Milestones:
    """Progress listener (see Progress) that passes on the milestones of prompts with a webhook.

    ``send(webhook, generation_id, updates)`` is called on the device's thread and must not wait; the id is
    JSON.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._on_device: list[_PromptInBatch] = []
        self._earlier: dict[Claim, int] = {}  # steps made, of prompts whose images come in several batches
        self._pace: dict[Hashable, float] = {}  # seconds per step, by shape and size of the batch
        self._lock = threading.Lock()
        self._batch_key: Hashable = None
        self._steps = 1
        self._batch_started = 0.0
        self._first_step: tuple[int, float] | None = None  # the first step reported, and when
        self._last_step = 0

    def begin(self, total: int | None) -> None:
        """Do nothing when a run begins."""

    def batch(self, requests: Sequence[Request]) -> None:
        """Start to follow the batch that goes on the device: 0 %, for prompts of which it is the first."""
        self._steps = requests[0].parameters.num_inference_steps
        self._batch_key = (requests[0].shape, len(requests))
        self._batch_started, self._first_step = time.monotonic(), None
        self._last_step = 0
        with self._lock:
            self._on_device = self._prompts_of(requests)
        self._send_milestones(0, self._pace.get(self._batch_key))

    def step(self, done: int, of: int) -> None:
        """Note that the batch has made ``done`` of its steps, which an engine may count in another unit.

        A step that is reported again only shows that the device works.
        """
        now, done, steps = time.monotonic(), done * self._steps // max(1, of), self._steps
        if done <= self._last_step:
            return
        self._last_step = done
        first, first_at = self._first_step = self._first_step or (done, now)
        # The first step includes encoding the texts, and on some devices their initialisation.
        if done > first:
            pace = (now - first_at) / (done - first)
        else:
            pace = self._pace.get(self._batch_key, (now - self._batch_started) / max(1, done))
        self._send_milestones(done, pace)
        if done == steps > first:
            _remember(self._pace, self._batch_key, pace)

    def recorded(self, outcomes: Sequence[Outcome]) -> None:
        """Forget the prompts whose outcomes are recorded."""
        with self._lock:
            for outcome in outcomes:
                self._earlier.pop(outcome.claim, None)

    def end(self) -> None:
        """Do nothing when the work is over."""

    def _prompts_of(self, requests: Sequence[Request]) -> list[_PromptInBatch]:
        """Return the batch's prompts that have a webhook, and count its steps for each."""
        with_webhook = {
            request.prompt.claim: request for request in requests if request.prompt.webhook_url is not None
        }
        images = Counter(request.prompt.claim for request in requests)
        prompts = []
        for claim, request in with_webhook.items():
            earlier, total_steps = self._earlier.get(claim, 0), request.num_images * self._steps
            prompts.append(_PromptInBatch(request.prompt, images[claim], earlier, total_steps, earlier or -1))
            _remember(self._earlier, claim, earlier + images[claim] * self._steps)
        return prompts

    def _send_milestones(self, done: int, pace: float | None) -> None:
        for prompt in self._on_device:
            step = min(prompt.total_steps, prompt.earlier_steps + prompt.images * done)
            seconds_left = 0 if pace is None else math.ceil(prompt.steps_left(done, self._steps) * pace)
            updates = [
                ProgressUpdate(percent, step, prompt.total_steps, seconds_left)
                for percent in milestones_between(prompt.reported_step, step, prompt.total_steps)
            ]
            prompt.reported_step = max(prompt.reported_step, step)
            if updates:
                self._send(str(prompt.prompt.webhook_url), json_text(prompt.prompt.id.json), updates)


def _remember(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    """Set the value as the latest, and forget the oldest if there are too many."""
    known.pop(key, None)
    known[key] = value
    if len(known) > _MAX_REMEMBERED:
        del known[next(iter(known))]
