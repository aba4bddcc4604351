"""An engine that takes a device's time and next to none of a processor's, and pictures that cost what
photographs cost to encode. Implements ``text2img.engine.Engine``; there is no model in it.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from text2img.engine import GeneratedImage, ModelInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from text2img.errors import PromptFailed
    from text2img.prompts import Request

_DIFFERENT = 16  # pictures; a picture's bytes are compared by nobody, so few are enough


def pictures(side: int) -> list[NDArray[np.uint8]]:
    """Smooth noise with a little grain, uint8 (side, side, 3): 0.4 MB as a PNG at 512²."""
    random = np.random.default_rng(0)
    return [_picture(random, side) for _ in range(_DIFFERENT)]


def _picture(random: np.random.Generator, side: int) -> NDArray[np.uint8]:
    coarse = random.integers(0, 256, (max(side // 16, 1), max(side // 16, 1), 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    grain = random.integers(-2, 3, (side, side, 3))
    return (np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)


class StubEngine:
    """Sleeps ``seconds`` a picture, in ``steps`` steps, as whoever waits for a device does.

    The device has its own clock: a step that was noticed late does not delay the next. ``batches`` is
    when each batch began and ended (``time.monotonic``), ``made`` how many pictures there were in all of
    them, ``cpu`` this process's processor seconds when the first one began.
    """

    def __init__(self, side: int, seconds: float = 0.0, steps: int = 20) -> None:
        self._pictures, self._side, self._per_picture, self._steps = pictures(side), side, seconds, steps
        self.batches: list[tuple[float, float]] = []
        self.made, self.cpu = 0, 0.0

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds by stage; see Engine."""
        return {"load": 0.0, "denoise": sum(ended - begun for begun, ended in self.batches), "decode": 0.0}

    def inspect(self) -> ModelInfo:
        """A card that lets everything pass; see Engine."""
        return ModelInfo(
            name="stub",
            revision=None,
            family="stub",
            width=self._side,
            height=self._side,
            multiple=8,
            scheduler="none",
            schedulers=(),
        )

    def load(self) -> None:
        """Nothing; see Engine."""

    def warm_up(self, batch: Sequence[Request], remaining: int) -> None:
        """Nothing; see Engine."""

    def prepare(self, request: Request) -> Request:
        """The request as it is; see Engine."""
        return request

    def generate(
        self, batch: Sequence[Request], on_step: Callable[[int, int], None]
    ) -> list[GeneratedImage | PromptFailed]:
        """A copy of one of the pictures for each request, after the device's time; see Engine."""
        begun = time.monotonic()
        if not self.batches:
            self.cpu = time.process_time()
        for step in range(1, self._steps + 1):
            due = begun + self._per_picture * len(batch) * step / self._steps
            time.sleep(max(0.0, due - time.monotonic()))
            on_step(step, self._steps)
        made: list[GeneratedImage | PromptFailed] = [self._draw(request) for request in batch]
        self.batches.append((begun, time.monotonic()))
        self.made += len(made)
        return made

    def peak_memory(self) -> int:
        """Not counted; see Engine."""
        return 0

    def close(self) -> None:
        """Nothing; see Engine."""

    def _draw(self, request: Request) -> GeneratedImage:
        pixels = self._pictures[request.parameters.seed % _DIFFERENT]
        return GeneratedImage(pixels=pixels.copy(), scheduler="none")
