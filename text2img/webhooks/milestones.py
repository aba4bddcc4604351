"""How far the prompts with a webhook are, told at milestones. Knows no HTTP and sends nothing itself."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from text2img.prompts import Claim, Outcome, Prompt, Request

    Send = Callable[[str, str, Sequence["Reached"]], None]

MILESTONES: Final = (0, 25, 50, 75, 90)
"""In percent of a prompt's steps."""
_REMEMBERED: Final = 1_000
"""So many shapes, and prompts with pictures to come, are remembered at the most."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Reached:
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
            told = [Reached(percent, step, each.of, left) for percent in reached(each.told, step, each.of)]
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
