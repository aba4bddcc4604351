"""Splits batches into parts, and decides what the failure of a part means.

A failure is the memory's, the device's or a prompt's. Where the error message does not tell, the engine finds
out: it runs smaller parts, a tiny kernel on the device, and a prompt of its own.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, NamedTuple

from text2img.engine.devices import FailureKind, classify_error, one_line, out_of_memory
from text2img.engine.steps import StepCounter
from text2img.errors import DeviceFailed, ErrorCode, PromptFailed, Text2ImgError
from text2img.prompts import Claim, Parameters, Prompt, PromptId, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from text2img.engine import GeneratedImage, ModelInfo

    Results = list[GeneratedImage | PromptFailed]
    GeneratePart = Callable[[Sequence[Request], StepCounter], Results]

logger = logging.getLogger(__name__)

_FAILURES: Final = 3
"""Failures in succession, of prompts and of the engine's own, after which the device is to blame."""
_OWN_SIDE: Final = 512
_OWN_STEPS: Final = 2
_OWN_GUIDANCE: Final = 5.0


class _Failure(NamedTuple):
    kind: FailureKind
    message: str


class BatchSplitter:
    """Runs batches part by part and remembers which sizes run.

    ``find_device_failure`` is called after each failure: it frees memory, and returns what is wrong with the
    device, None if it works. ``own_request`` creates a request that any working engine can run.
    """

    def __init__(
        self,
        generate_part: GeneratePart,
        find_device_failure: Callable[[], str | None],
        own_request: Callable[[], Request],
    ) -> None:
        self._generate_part = generate_part
        self._find_device_failure = find_device_failure
        self._own_request = own_request
        self._max_sizes: dict[Hashable, int] = {}
        self._suspects: dict[PromptId, _Failure] = {}
        """Prompts of the batch that failed in succession for an unknown cause."""

    def generate(self, batch: Sequence[Request], steps: StepCounter) -> Results:
        """Return a result for each request, in order. Raises what the callback raised, and DeviceFailed."""
        self._suspects.clear()
        results = self._generate(batch, steps, len(batch))
        if self._suspects:
            self._check_suspects(steps)
        return results

    def max_size(self, request: Request) -> int | None:
        """Return how many such requests run at once; None if unknown."""
        return self._max_sizes.get(_memory_key(request))

    def part_size(self, batch: Sequence[Request]) -> int:
        """Return how many requests of the batch run at once."""
        return min(self.max_size(batch[0]) or len(batch), len(batch))

    def _generate(self, batch: Sequence[Request], steps: StepCounter, max_size: int) -> Results:
        """Return the results of the batch, run in parts of ``max_size`` at the most."""
        results: Results = []
        while len(results) < len(batch):
            size = min(max_size, self.part_size(batch))
            results += self._generate_or_halve(batch[len(results) : len(results) + size], steps)
        return results

    def _generate_or_halve(self, part: Sequence[Request], steps: StepCounter) -> Results:
        """Return the results of the part, of its halves if it fails, of each alone if these fail.

        If the prompts do not fail in smaller parts, the size was the cause, whatever the error was called.
        """
        outcome = self._attempt(part, steps)
        if isinstance(outcome, list):
            self._note(outcome)
            steps.finished += len(part)
            return outcome
        if len(part) == 1:
            failed = self._fail(part[0], outcome, steps)
            steps.finished += 1
            return [failed]
        half = len(part) // 2
        if outcome.kind is FailureKind.MEMORY:
            self._limit(part, half, outcome)
        results = self._generate(part, steps, half)
        if not any(_is_unexplained(result) for result in results):
            self._limit(part, half, outcome)
        return results

    def _attempt(self, part: Sequence[Request], steps: StepCounter) -> Results | _Failure:
        """Return the part's results, or its failure.

        The exception itself is dropped: its traceback holds the tensors of all its frames, which must be
        freed before the next attempt.
        """
        try:
            return self._generate_part(part, steps)
        except Text2ImgError:
            raise
        except Exception as exc:
            if exc is steps.raised:
                raise
            failure = _Failure(classify_error(exc), one_line(exc))
            logger.debug("a part of %d requests failed: %s", len(part), failure.message, exc_info=True)
        if failure.kind is FailureKind.DEVICE:
            raise DeviceFailed(f"the device has failed: {failure.message}")
        reason = self._find_device_failure()
        if reason is not None:
            raise DeviceFailed(f"the device has failed: {failure.message}; then a test of it: {reason}")
        return failure

    def _limit(self, part: Sequence[Request], size: int, failure: _Failure) -> None:
        """Remember that requests like these run at most ``size`` at once."""
        key = _memory_key(part[0])
        if self._max_sizes.get(key, len(part)) <= size:
            return
        self._max_sizes[key] = size
        if failure.kind is FailureKind.MEMORY:
            logger.info("a batch of %d does not fit into memory; continuing with %d", len(part), size)
        else:
            logger.warning(
                "a batch of %d fails and its prompts do not; continuing with %d: %s",
                len(part),
                size,
                failure.message,
            )

    def _note(self, results: Results) -> None:
        """Clear the suspects if a result shows that model and device work."""
        if not all(_shows_nothing(result) for result in results):
            self._suspects.clear()

    def _fail(self, request: Request, failure: _Failure, steps: StepCounter) -> PromptFailed:
        """Return the failure of a request that ran alone. Raises DeviceFailed if the engine fails on any."""
        if failure.kind is FailureKind.MEMORY:
            return out_of_memory(request.parameters.width, request.parameters.height)
        self._suspects[request.prompt.id] = failure
        if len(self._suspects) == _FAILURES - 1:
            self._check_suspects(steps)
        return PromptFailed(
            ErrorCode.GENERATION_FAILED, f"the model failed on this prompt: {failure.message}"
        )

    def _check_suspects(self, steps: StepCounter) -> None:
        """Run the engine's own request. Raises DeviceFailed if it fails: then no prompt is to blame."""
        for _ in range(_FAILURES - len(self._suspects)):
            reason = self._run_own_request(steps)
            if reason is None:
                self._suspects.clear()
                return
        failure = next(reversed(self._suspects.values()))
        raise DeviceFailed(
            f"the device has failed: {failure.message}; a prompt of the engine's own fails as well: {reason}"
        )

    def _run_own_request(self, steps: StepCounter) -> str | None:
        """Run the engine's own request; return why it fails, or None if it does not."""

        def heartbeat(_done: int, _total: int) -> None:
            steps.step(0, 1, 0)

        request = self._own_request()
        counter = StepCounter(heartbeat, 1, request.parameters.num_inference_steps)
        outcome = self._attempt([request], counter)
        if isinstance(outcome, _Failure):
            return outcome.message
        return str(outcome[0]) if _shows_nothing(outcome[0]) else None


_INCONCLUSIVE: Final = (ErrorCode.GENERATION_FAILED, ErrorCode.OUT_OF_MEMORY, ErrorCode.LORA_FAILED)
"""Failures of prompts that do not show that the model and the device work."""


def _shows_nothing(result: GeneratedImage | PromptFailed) -> bool:
    return isinstance(result, PromptFailed) and result.code in _INCONCLUSIVE


def _is_unexplained(result: GeneratedImage | PromptFailed) -> bool:
    return isinstance(result, PromptFailed) and result.code is ErrorCode.GENERATION_FAILED


def _memory_key(request: Request) -> Hashable:
    """Return what determines the memory that a request needs."""
    parameters = request.parameters
    return parameters.width, parameters.height, request.chunks, parameters.guidance_scale > 1


def own_request(info: ModelInfo) -> Request:
    """Return a small request that any working engine can run with this model."""

    def side(native: int) -> int:
        return max(info.multiple, min(native, _OWN_SIDE) // info.multiple * info.multiple)

    return Request(
        prompt=Prompt(claim=Claim(PromptId("str", "engine"), "engine", 0), text=""),
        text="a red apple on a wooden table",
        parameters=Parameters(
            negative_prompt="",
            seed=0,
            num_inference_steps=_OWN_STEPS,
            guidance_scale=_OWN_GUIDANCE,
            width=side(info.width),
            height=side(info.height),
            scheduler=None,
        ),
    )
