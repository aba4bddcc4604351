"""One call of a pipeline: requests of one shape in, latents (or pictures) out.

Knows what each family's call takes; knows nothing of parts, pixels, or what an exception means.
"""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any, Final

from text2img.engine.devices import FailureKind, classify_error, one_line
from text2img.engine.text_encoding import ChunkedText, PipelineText, WholeText
from text2img.errors import DeviceFailed, ErrorCode, PromptFailed, Text2ImgError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from contextlib import AbstractContextManager

    from text2img.engine import Picture
    from text2img.engine.model_folder import Family
    from text2img.prompts import Request


if TYPE_CHECKING:
    Run = Callable[[], AbstractContextManager[None]]

logger = logging.getLogger(__name__)

_CHUNKED: Final = ("sd", "sdxl")
_SCHNELL: Final = 256
"""Tokens that FLUX.1-schnell was trained to read; diffusers' default, 512, is FLUX.1-dev's."""


class Denoiser:
    """Calls one pipeline. ``output`` is the output type asked of it; each call stands within a ``run``.

    ``voice`` says what decides, beside a text, how it is read at the moment (LoRAs of the text encoders).
    """

    def __init__(
        self, pipe: Any, family: Family, output: str, run: Run, text_lora_key: Callable[[], Hashable] = tuple
    ) -> None:
        self._pipe = pipe
        self._family = family
        self._output = output
        self._run = run
        self._takes = inspect.signature(pipe.__call__).parameters
        self._longest = self._reads()
        self._chunked = ChunkedText(pipe, text_lora_key) if family.name in _CHUNKED else None
        self._whole = WholeText(pipe, self._longest or 512)
        self._reader = self._chunked or self._pipelines(text_lora_key)
        self._negatives = "negative_prompt" in self._takes and "true_cfg_scale" not in self._takes
        self._told = False

    def chunks(self, request: Request) -> int:
        """How many windows of the text encoder the prompt or its negative prompt fills; 1 where it is cut."""
        if self._chunked is None:
            return 1
        return self._chunked.count(request.text, request.parameters.negative_prompt)

    def truncated(self, request: Request) -> bool:
        """Whether the model reads only the beginning of the text."""
        return self._chunked is None and self._whole.truncated(request.text)

    def draw(self, part: Sequence[Request], scheduler: Any, steps: StepCounter, rows: int) -> Any:
        """The pipeline's output for the part. Every request has its own noise, made on the CPU from its
        seed, so that it is the same beside other neighbours, in another try, and on another device.

        Drawn in ``rows`` rows: where there are more than requests, the last request fills them up, and what
        comes of that is dropped.
        """
        import torch

        wanted = part[0].parameters
        of, part = len(part), [*part, *[part[-1]] * (rows - len(part))]
        self._pipe.scheduler = scheduler
        arguments = {
            **self._text(part),
            "width": wanted.width,
            "height": wanted.height,
            "num_inference_steps": wanted.num_inference_steps,
            "guidance_scale": wanted.guidance_scale,
            "generator": [torch.Generator("cpu").manual_seed(one.parameters.seed) for one in part],
            "output_type": self._output,
            "callback_on_step_end": self._callback(of, steps),
        }
        takes = {name: value for name, value in arguments.items() if name in self._takes}
        with self._run():
            return self._pipe(**takes).images[:of]

    def _text(self, part: Sequence[Request]) -> dict[str, Any]:
        texts = [one.text for one in part]
        negatives = [one.parameters.negative_prompt for one in part]
        if not self._negatives:
            self._tell_unused(negatives)
        if self._reader is not None:
            guided = self._negatives and part[0].parameters.guidance_scale > 1
            return self._reader.encode(texts, negatives if guided else None, part[0].chunks)
        arguments: dict[str, Any] = {"prompt": texts}
        if self._longest is not None:
            arguments["max_sequence_length"] = self._longest
        return arguments | ({"negative_prompt": negatives} if self._negatives else {})

    def _tell_unused(self, negatives: Sequence[str]) -> None:
        """Say once that negative prompts are not read by a model whose guidance is a number it is fed."""
        if any(negatives) and not self._told:
            self._told = True
            logger.warning("%s reads no negative prompts; they are left out", type(self._pipe).__name__)

    def _callback(self, part: int, steps: StepCounter) -> Any:
        def step_ended(pipe: Any, index: int, _: Any, __: dict[str, Any]) -> dict[str, Any]:
            steps.step(index + 1, int(getattr(pipe, "num_timesteps", None) or index + 1), part)
            return {}

        return step_ended

    def _pipelines(self, text_lora_key: Callable[[], Hashable]) -> PipelineText | None:
        """What reads prompts by the pipeline's own encoders, where it is known what they return."""
        if self._family.name not in PipelineText.FAMILIES or self._longest is None:
            return None
        return PipelineText(self._pipe, self._family, self._longest, text_lora_key)

    def _reads(self) -> int | None:
        """Tokens that the pipeline reads of a prompt, where it is told how many."""
        parameter = self._takes.get("max_sequence_length")
        if parameter is None or not isinstance(parameter.default, int):
            return None
        if self._family.name == "flux" and not self._pipe.transformer.config.guidance_embeds:
            return _SCHNELL
        return parameter.default


if TYPE_CHECKING:
    Results = list[Picture | PromptFailed]
    Draw = Callable[[Sequence[Request], "StepCounter"], Results]


class StepCounter:
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


class BatchSplitter:
    """Draws batches part by part and remembers what fits. ``free`` gives memory back before another try."""

    def __init__(self, draw: Draw, free: Callable[[], None]) -> None:
        self._draw = draw
        self._free = free
        self._fits: dict[Hashable, int] = {}

    def draw(self, batch: Sequence[Request], steps: StepCounter) -> Results:
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
            elif outcome[0] is FailureKind.MEMORY:
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

    def _attempt(self, part: Sequence[Request], steps: StepCounter) -> Results | tuple[FailureKind, str]:
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
            kind, message = classify_error(exc), one_line(exc)
            logger.debug("a part of %d requests failed: %s", len(part), message, exc_info=True)
        if kind is FailureKind.DEVICE:
            raise DeviceFailed(f"the device has failed: {message}")
        self._free()
        return kind, message


def _room(request: Request) -> Hashable:
    """What decides how much memory a request takes."""
    wanted = request.parameters
    return wanted.width, wanted.height, request.chunks, wanted.guidance_scale > 1


def _failed(outcome: tuple[FailureKind, str], request: Request) -> PromptFailed:
    kind, message = outcome
    wanted = request.parameters
    if kind is FailureKind.MEMORY:
        return PromptFailed(
            ErrorCode.OUT_OF_MEMORY,
            f"a picture of {wanted.width}×{wanted.height} does not fit into the device's memory, even alone",
        )
    return PromptFailed(ErrorCode.GENERATION_FAILED, f"the model failed on this prompt: {message}")
