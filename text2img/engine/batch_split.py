"""A batch in parts: halved when it does not fit, one by one when something in it is broken.

Knows no pipeline and no tensor; what an exception means it asks ``devices``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from text2img.engine.devices import Trouble, one_line, trouble
from text2img.errors import DeviceFailed, ErrorCode, PromptFailed, Text2ImgError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from text2img.engine import Picture
    from text2img.prompts import Request

    Results = list[Picture | PromptFailed]
    Draw = Callable[[Sequence[Request], "Steps"], Results]

logger = logging.getLogger(__name__)


class Steps:
    """Tells how far a whole batch is while its parts are drawn: never backwards, never beyond the end.

    Some schedulers call back once too often or twice a step; a part that is drawn again starts again.
    """

    def __init__(self, tell: Callable[[int, int], None], requests: int, of: int) -> None:
        self._tell = tell
        self._requests = requests
        self._of = of
        self._done = 0
        self.finished = 0
        self.raised: BaseException | None = None

    def step(self, done: int, calls: int, part: int) -> None:
        """``done`` of a part's ``calls`` steps are done; what the listener raises is kept in ``raised``."""
        calls = max(calls, done, 1)
        whole = self.finished * calls + part * done
        self._done = max(self._done, min(self._of, self._of * whole // (self._requests * calls)))
        try:
            self._tell(self._done, self._of)
        except BaseException as exc:
            self.raised = exc
            raise


class Parts:
    """Draws batches part by part and remembers what fits. ``free`` gives memory back before another try."""

    def __init__(self, draw: Draw, free: Callable[[], None]) -> None:
        self._draw = draw
        self._free = free
        self._fits: dict[Hashable, int] = {}

    def draw(self, batch: Sequence[Request], steps: Steps) -> Results:
        """A result for each request, in order. Raises what the listener raised, and DeviceFailed."""
        results: Results = []
        suspects = 0  # so many results from the start on are drawn one by one
        while len(results) < len(batch):
            size = 1 if len(results) < suspects else self.size(batch)
            part = batch[len(results) : len(results) + size]
            outcome = self._attempt(part, steps)
            if isinstance(outcome, list):
                results += outcome
            elif len(part) == 1:
                results.append(_failed(outcome, part[0]))
            elif outcome[0] is Trouble.MEMORY:
                half = len(part) // 2
                self._fits[_room(part[0])] = half
                logger.info("a batch of %d does not fit in memory; going on with %d", len(part), half)
            else:
                suspects = len(results) + len(part)
            steps.finished = len(results)
        return results

    def most(self, request: Request) -> int | None:
        """How many such requests fit into memory at once; None where nothing is known."""
        return self._fits.get(_room(request))

    def size(self, batch: Sequence[Request]) -> int:
        """How many of the batch are drawn at once."""
        return min(self.most(batch[0]) or len(batch), len(batch))

    def _attempt(self, part: Sequence[Request], steps: Steps) -> Results | tuple[Trouble, str]:
        """The part's results, or what went wrong. Nothing of the failed try is kept: a traceback holds the
        tensors of all its frames, and they must be gone before the next try.
        """
        try:
            return self._draw(part, steps)
        except Text2ImgError:
            raise
        except Exception as exc:
            if exc is steps.raised:
                raise
            kind, sentence = trouble(exc), one_line(exc)
            logger.debug("a part of %d requests failed: %s", len(part), sentence, exc_info=True)
        if kind is Trouble.DEVICE:
            raise DeviceFailed(f"the device has failed: {sentence}")
        self._free()
        return kind, sentence


def _room(request: Request) -> Hashable:
    """What decides how much memory a request takes."""
    wanted = request.parameters
    return wanted.width, wanted.height, request.chunks, wanted.guidance_scale > 1


def _failed(outcome: tuple[Trouble, str], request: Request) -> PromptFailed:
    kind, sentence = outcome
    wanted = request.parameters
    if kind is Trouble.MEMORY:
        return PromptFailed(
            ErrorCode.OUT_OF_MEMORY,
            f"a picture of {wanted.width}×{wanted.height} does not fit into the device's memory, even alone",
        )
    return PromptFailed(ErrorCode.GENERATION_FAILED, f"the model failed on this prompt: {sentence}")
