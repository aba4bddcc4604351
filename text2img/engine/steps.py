"""The parts and the steps of a batch: split it where it does not fit, count what is done, judge failures."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from text2img.engine.devices import FailureKind, classify_error, one_line, out_of_memory
from text2img.errors import DeviceFailed, ErrorCode, PromptFailed, Text2ImgError
from text2img.prompts import Claim, Parameters, Prompt, PromptId, Request

if TYPE_CHECKING:
    import inspect
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    from text2img.engine import GeneratedImage, ModelInfo
    from text2img.engine.model_folder import Family


_QUIET_SECONDS: Final = 5.0
"""Seconds without a step after which forward passes are reported, if the pipeline reports its own steps."""


class StepCounter:
    """Reports the progress of a whole batch while its parts run; it never goes backwards or beyond the end.

    Some schedulers call back once too often or twice a step. A part that runs again starts again.
    """

    def __init__(self, on_step: Callable[[int, int], None], requests: int, total: int) -> None:
        self._on_step = on_step
        self._requests = requests
        self._total = total
        self._done = 0
        self._last_report = time.monotonic()
        self.finished = 0
        self.raised: BaseException | None = None

    def step(self, done: int, calls: int, requests: int) -> None:
        """Report that ``done`` of a part's ``calls`` steps are done.

        An exception of the callback is kept in ``raised``.
        """
        calls = max(calls, done, 1)
        calls_done = self.finished * calls + requests * done
        self._done = max(self._done, min(self._total, self._total * calls_done // (self._requests * calls)))
        self._report()

    def sign_of_life(self, quiet: float) -> None:
        """Repeat the last report, unless it is younger than ``quiet`` seconds: the device works."""
        if time.monotonic() - self._last_report >= quiet:
            self._report()

    def _report(self) -> None:
        self._last_report = time.monotonic()
        try:
            self._on_step(self._done, self._total)
        except BaseException as exc:
            self.raised = exc
            raise


class StepSource:
    """Observes one pipeline. ``parameters`` are those of its call.

    ``calls_back``: the pipeline reports its own steps, and how many there will be. Pipelines with several
    schedulers report those of their last stage only, which is not enough.
    """

    def __init__(self, pipe: Any, family: Family, parameters: Mapping[str, inspect.Parameter]) -> None:
        self._pipe, self._family, self._parameters = pipe, family, parameters
        reports = "callback_on_step_end" in parameters and hasattr(type(pipe), "num_timesteps")
        self.calls_back = reports and len(self._schedulers()) < 2

    @contextlib.contextmanager
    def forward_passes(self, steps: StepCounter) -> Iterator[None]:
        """Report the forward passes of the pipeline's models and decoders to ``steps`` within the context.

        Not those of the denoiser that may be compiled: a hook would break its graph.
        """
        quiet = _QUIET_SECONDS if self.calls_back else 0.0

        def passed(*_: object) -> None:
            steps.sign_of_life(quiet)

        hooks = [module.register_forward_hook(passed) for module in self._modules()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def count(self, requests: int, num_inference_steps: int, steps: StepCounter) -> Iterator[None]:
        """Report the steps of one call, for ``requests`` requests, unless the pipeline reports them."""
        if self.calls_back:
            yield
            return
        schedulers = self._schedulers()
        expected = {name: self._expected_steps(name, num_inference_steps) for name in schedulers}
        done = dict.fromkeys(schedulers, 0)

        def stepped(name: str) -> None:
            done[name] += 1
            # Some schedulers need more calls than steps; their list of timesteps has the exact number.
            expected[name] = max(len(schedulers[name].timesteps), done[name])
            steps.step(sum(done.values()), sum(expected.values()), requests)

        with contextlib.ExitStack() as stack:
            for name, scheduler in schedulers.items():
                stack.enter_context(_observed(scheduler, functools.partial(stepped, name)))
            yield
        if done != expected:
            steps.step(1, 1, requests)

    def _schedulers(self) -> dict[str, Any]:
        """Return the pipeline's schedulers by component name, each once."""
        found: dict[int, tuple[str, Any]] = {}
        for name, component in self._pipe.components.items():
            if hasattr(component, "step") and hasattr(component, "set_timesteps"):
                found.setdefault(id(component), (name, component))
        return dict(found.values())

    def _expected_steps(self, name: str, num_inference_steps: int) -> int:
        """Return how many steps a scheduler will make; of ``prior_scheduler``, by the call's default."""
        parameter = self._parameters.get(f"{name.removesuffix('scheduler')}num_inference_steps")
        own = None if parameter is None or name == "scheduler" else parameter.default
        return own if isinstance(own, int) else num_inference_steps

    def _modules(self) -> Iterator[Any]:
        """Yield the pipeline's models, and the decoders of its autoencoders, which run without the whole."""
        import torch

        compilable = getattr(self._pipe, self._family.denoiser, None) if self._family.denoiser else None
        for component in self._pipe.components.values():
            if isinstance(component, torch.nn.Module) and component is not compilable:
                yield component
                if isinstance(decoder := getattr(component, "decoder", None), torch.nn.Module):
                    yield decoder


@contextlib.contextmanager
def _observed(scheduler: Any, after: Callable[[], None]) -> Iterator[None]:
    """Call ``after`` after each call of the scheduler's ``step`` within the context."""
    replaced, step = vars(scheduler).get("step"), scheduler.step

    @functools.wraps(step)  # pipelines read the signature
    def observed(*arguments: Any, **named: Any) -> Any:
        result = step(*arguments, **named)
        after()
        return result

    scheduler.step = observed
    try:
        yield
    finally:
        if replaced is None:
            del scheduler.step
        else:
            scheduler.step = replaced


if TYPE_CHECKING:
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
        """Return the results of the batch, run in parts of at most ``max_size``."""
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
    return parameters.width, parameters.height, request.chunks, (parameters.guidance_scale or 0) > 1


def own_request(info: ModelInfo) -> Request:
    """Return a small request that any working engine can run with this model."""

    def side(native: int) -> int:
        if info.sizes or info.fixed_area:
            return native
        return max(info.multiple, min(native, _OWN_SIDE) // info.multiple * info.multiple)

    return Request(
        prompt=Prompt(claim=Claim(PromptId("str", "engine"), "engine", 0), text=""),
        text="a red apple on a wooden table",
        parameters=Parameters(
            negative_prompt="",
            seed=0,
            num_inference_steps=_OWN_STEPS,
            guidance_scale=_OWN_GUIDANCE if info.guidance else None,
            width=side(info.width),
            height=side(info.height),
            scheduler=None,
        ),
    )
