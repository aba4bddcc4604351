"""What every training loop here shares: the learning rate's course, the step, checkpoints.

Knows nothing of what is being trained.
"""

from __future__ import annotations

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

WARM_UP_STEPS = 100
REPORT_EVERY = 50
SAVE_EVERY = 200
THREADS = 2


@dataclass(frozen=True, slots=True)
class Course:
    """How long a network learns and how fast: a short warm-up, then half a cosine from peak to floor."""

    steps: int
    peak: float = 2e-3
    floor: float = 4e-5

    def rate(self, step: int) -> float:
        """The learning rate of one step."""
        if step < WARM_UP_STEPS:
            return self.peak * (step + 1) / WARM_UP_STEPS
        progress = (step - WARM_UP_STEPS) / max(1, self.steps - WARM_UP_STEPS)
        return self.floor + (self.peak - self.floor) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class Learner:
    """A network, its optimiser, and the checkpoint from which an interrupted training goes on."""

    def __init__(self, network: torch.nn.Module, course: Course, checkpoint: Path, **extra: Any) -> None:
        """`extra`: anything else with state_dict, saved alongside."""
        self.network, self.course, self.checkpoint = network, course, checkpoint
        self.optimiser = torch.optim.AdamW(network.parameters(), lr=course.peak, weight_decay=1e-4)
        self.parts: dict[str, Any] = {"network": network, "optimiser": self.optimiser, **extra}
        self.pool = ThreadPoolExecutor(THREADS, initializer=torch.set_num_threads, initargs=(1,))
        self.step = 0
        self.seconds = 0.0
        if checkpoint.exists():
            self._restore()

    def steps(self) -> Iterator[int]:
        """The numbers of the steps still to do; saves the state now and then, and at the end."""
        while self.step < self.course.steps:
            begun = time.monotonic()
            yield self.step
            self.seconds += time.monotonic() - begun
            self.step += 1
            if self.step % SAVE_EVERY == 0 or self.step == self.course.steps:
                self._save()

    def learn(self, loss: Callable[..., torch.Tensor], *batch: torch.Tensor) -> None:
        """One step of the optimiser down `loss(*part)`, averaged over the batch's parts, one for each thread.

        Threads with half a batch each meet once a step. Threads within each operation meet thousands of
        times: that took half as long again on idle cores, and many times as long on busy ones.
        """
        for group in self.optimiser.param_groups:
            group["lr"] = self.course.rate(self.step)
        parameters = list(self.network.parameters())

        def differentiate(part: tuple[torch.Tensor, ...]) -> tuple[float, tuple[torch.Tensor, ...]]:
            value = loss(*part)
            return value.item(), torch.autograd.grad(value, parameters, materialize_grads=True)

        parts = zip(*(tensor.chunk(THREADS) for tensor in batch), strict=True)
        values, gradients = zip(*self.pool.map(differentiate, parts), strict=True)
        for parameter, *shares in zip(parameters, *gradients, strict=True):
            parameter.grad = torch.stack(shares).mean(dim=0)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimiser.step()
        if self.step % REPORT_EVERY == 0:
            print(f"{self.step:6}  {self.seconds:6.0f} s  loss {sum(values) / len(values):.5f}", flush=True)

    def _save(self) -> None:
        """Write the state beside the old one, then put it in its place: never half a checkpoint."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": self.step, "seconds": self.seconds}
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        draft = self.checkpoint.with_suffix(".draft")
        torch.save(state, draft)
        os.replace(draft, self.checkpoint)  # noqa: PTH105

    def _restore(self) -> None:
        """Go on where the checkpoint was left."""
        state = torch.load(self.checkpoint, weights_only=True)
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
