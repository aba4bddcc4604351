"""The denoising call of a pipeline, the step counter, and the splitting of batches that exceed the memory.

A part is what runs at once of a batch: requests of one shape go in, latents (or images) come out.
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

    from text2img.engine import GeneratedImage
    from text2img.engine.model_folder import Family
    from text2img.prompts import Request


if TYPE_CHECKING:
    RunContext = Callable[[], AbstractContextManager[None]]

logger = logging.getLogger(__name__)

_CHUNKED_FAMILIES: Final = ("sd", "sdxl")
_SCHNELL_TOKENS: Final = 256
"""Tokens that FLUX.1-schnell was trained to read; diffusers' default, 512, is FLUX.1-dev's."""


class Denoiser:
    """Calls one pipeline, each time within a ``run_context``; ``output`` is the requested output type.

    ``text_lora_key`` returns what the embeddings of a text depend on besides the text: the active LoRAs of
    the text encoders.
    """

    def __init__(
        self,
        pipe: Any,
        family: Family,
        output: str,
        run_context: RunContext,
        text_lora_key: Callable[[], Hashable] = tuple,
    ) -> None:
        self._pipe = pipe
        self._family = family
        self._output = output
        self._run_context = run_context
        self._parameters = inspect.signature(pipe.__call__).parameters
        self._max_sequence_length = self._find_max_sequence_length()
        self._chunked_text = ChunkedText(pipe, text_lora_key) if family.name in _CHUNKED_FAMILIES else None
        self._whole_text = WholeText(pipe, self._max_sequence_length or 512)
        self._text_encoder = self._chunked_text or self._open_pipeline_text(text_lora_key)
        self._takes_negative_prompts = (
            "negative_prompt" in self._parameters and "true_cfg_scale" not in self._parameters
        )
        self._warned = False

    def chunks(self, request: Request) -> int:
        """Return the number of text-encoder windows that the longer of prompt and negative prompt fills.

        Returns 1 where the pipeline truncates long texts.
        """
        if self._chunked_text is None:
            return 1
        return self._chunked_text.count(request.text, request.parameters.negative_prompt)

    def truncated(self, request: Request) -> bool:
        """Return True if the model reads only the beginning of the text."""
        return self._chunked_text is None and self._whole_text.truncated(request.text)

    def denoise(self, part: Sequence[Request], scheduler: Any, steps: StepCounter, rows: int) -> Any:
        """Return the pipeline's output for the part, run in ``rows`` rows.

        Every request has its own noise, generated on the CPU from its seed. The noise is thus the same in
        another batch, in another attempt, and on another device. Where there are more rows than requests, the
        last request is repeated and the surplus output is dropped.
        """
        import torch

        parameters = part[0].parameters
        requests, part = len(part), [*part, *[part[-1]] * (rows - len(part))]
        self._pipe.scheduler = scheduler
        arguments = {
            **self._text_arguments(part),
            "width": parameters.width,
            "height": parameters.height,
            "num_inference_steps": parameters.num_inference_steps,
            "guidance_scale": parameters.guidance_scale,
            "generator": [torch.Generator("cpu").manual_seed(request.parameters.seed) for request in part],
            "output_type": self._output,
            "callback_on_step_end": self._step_callback(requests, steps),
        }
        accepted = {name: value for name, value in arguments.items() if name in self._parameters}
        with self._run_context():
            return self._pipe(**accepted).images[:requests]

    def _text_arguments(self, part: Sequence[Request]) -> dict[str, Any]:
        texts = [request.text for request in part]
        negatives = [request.parameters.negative_prompt for request in part]
        if not self._takes_negative_prompts:
            self._warn_unused(negatives)
        if self._text_encoder is not None:
            guided = self._takes_negative_prompts and part[0].parameters.guidance_scale > 1
            return self._text_encoder.encode(texts, negatives if guided else None, part[0].chunks)
        arguments: dict[str, Any] = {"prompt": texts}
        if self._max_sequence_length is not None:
            arguments["max_sequence_length"] = self._max_sequence_length
        return arguments | ({"negative_prompt": negatives} if self._takes_negative_prompts else {})

    def _warn_unused(self, negatives: Sequence[str]) -> None:
        """Warn once that the model ignores negative prompts, because its guidance is a number it gets."""
        if any(negatives) and not self._warned:
            self._warned = True
            logger.warning("%s does not support negative prompts; ignoring them", type(self._pipe).__name__)

    def _step_callback(self, requests: int, steps: StepCounter) -> Any:
        def step_ended(pipe: Any, index: int, _: Any, __: dict[str, Any]) -> dict[str, Any]:
            steps.step(index + 1, int(getattr(pipe, "num_timesteps", None) or index + 1), requests)
            return {}

        return step_ended

    def _open_pipeline_text(self, text_lora_key: Callable[[], Hashable]) -> PipelineText | None:
        """Return an encoder that uses the pipeline's own ``encode_prompt``, None if its output is unknown."""
        if self._family.name not in PipelineText.POOLED_INDEX or self._max_sequence_length is None:
            return None
        return PipelineText(self._pipe, self._family, self._max_sequence_length, text_lora_key)

    def _find_max_sequence_length(self) -> int | None:
        """Return the number of tokens that the pipeline reads of a prompt; None if it has no such option."""
        parameter = self._parameters.get("max_sequence_length")
        if parameter is None or not isinstance(parameter.default, int):
            return None
        if self._family.name == "flux" and not self._pipe.transformer.config.guidance_embeds:
            return _SCHNELL_TOKENS
        return parameter.default


if TYPE_CHECKING:
    Results = list[GeneratedImage | PromptFailed]
    GeneratePart = Callable[[Sequence[Request], "StepCounter"], Results]


class StepCounter:
    """Reports the progress of a whole batch while its parts run; it never goes backwards or beyond the end.

    Some schedulers call back once too often or twice a step. A part that runs again starts again.
    """

    def __init__(self, on_step: Callable[[int, int], None], requests: int, total: int) -> None:
        self._on_step = on_step
        self._requests = requests
        self._total = total
        self._done = 0
        self.finished = 0
        self.raised: BaseException | None = None

    def step(self, done: int, calls: int, requests: int) -> None:
        """Report that ``done`` of a part's ``calls`` steps are done.

        An exception of the callback is kept in ``raised``.
        """
        calls = max(calls, done, 1)
        calls_done = self.finished * calls + requests * done
        self._done = max(self._done, min(self._total, self._total * calls_done // (self._requests * calls)))
        try:
            self._on_step(self._done, self._total)
        except BaseException as exc:
            self.raised = exc
            raise


class BatchSplitter:
    """Runs batches part by part and remembers which sizes fit into memory.

    ``free_memory`` is called after a failure, before the next attempt.
    """

    def __init__(self, generate_part: GeneratePart, free_memory: Callable[[], None]) -> None:
        self._generate_part = generate_part
        self._free_memory = free_memory
        self._max_sizes: dict[Hashable, int] = {}

    def generate(self, batch: Sequence[Request], steps: StepCounter) -> Results:
        """Return a result for each request, in order. Raises what the callback raised, and DeviceFailed."""
        results: Results = []
        single_until = 0  # up to this index, requests run one by one
        while len(results) < len(batch):
            size = 1 if len(results) < single_until else self.part_size(batch)
            part = batch[len(results) : len(results) + size]
            outcome = self._attempt(part, steps)
            if isinstance(outcome, list):
                results += outcome
            elif len(part) == 1:
                results.append(_prompt_failure(outcome, part[0]))
            elif outcome[0] is FailureKind.MEMORY:
                half = len(part) // 2
                self._max_sizes[_memory_key(part[0])] = half
                logger.info("a batch of %d does not fit into memory; continuing with %d", len(part), half)
            else:
                single_until = len(results) + len(part)
            steps.finished = len(results)
        return results

    def max_size(self, request: Request) -> int | None:
        """Return how many such requests fit into memory at once; None if unknown."""
        return self._max_sizes.get(_memory_key(request))

    def part_size(self, batch: Sequence[Request]) -> int:
        """Return how many requests of the batch run at once."""
        return min(self.max_size(batch[0]) or len(batch), len(batch))

    def _attempt(self, part: Sequence[Request], steps: StepCounter) -> Results | tuple[FailureKind, str]:
        """Return the part's results, or the failure's kind and message.

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
            kind, message = classify_error(exc), one_line(exc)
            logger.debug("a part of %d requests failed: %s", len(part), message, exc_info=True)
        if kind is FailureKind.DEVICE:
            raise DeviceFailed(f"the device has failed: {message}")
        self._free_memory()
        return kind, message


def _memory_key(request: Request) -> Hashable:
    """Return what determines the memory that a request needs."""
    parameters = request.parameters
    return parameters.width, parameters.height, request.chunks, parameters.guidance_scale > 1


def _prompt_failure(outcome: tuple[FailureKind, str], request: Request) -> PromptFailed:
    kind, message = outcome
    parameters = request.parameters
    if kind is FailureKind.MEMORY:
        return PromptFailed(
            ErrorCode.OUT_OF_MEMORY,
            f"a single image of {parameters.width}×{parameters.height} does not fit into the device's memory",
        )
    return PromptFailed(ErrorCode.GENERATION_FAILED, f"the model failed on this prompt: {message}")
