"""The steps of a batch: their count, and where a pipeline shows them.

A forward pass is a sign of life, and not a step: pipelines call their denoiser once or twice a step, and some
run a prior first. A step of the pipeline is a call of its scheduler's ``step``.
"""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import inspect
    from collections.abc import Callable, Iterator, Mapping

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
