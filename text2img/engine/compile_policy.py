"""torch's compiler for one denoiser, and the policy that decides per batch shape whether it pays.

Compiling takes ``cost`` seconds once and then saves the share ``gain`` of every image's denoising time. It
pays when remaining images · seconds per image · gain > cost.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from text2img.engine.devices import FailureKind, classify_error, free_caches, one_line
from text2img.errors import ConfigurationError, DeviceFailed, Text2ImgError
from text2img.settings import expand_home

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from text2img.engine import Compile
    from text2img.engine.lora_adapters import Adapters, LoraCapacity
    from text2img.prompts import Request


_MAX_RECOMPILATIONS: Final = 64
"""Maximum number of shapes and sizes that a process compiles; torch's own default is 8."""


class Compiler:
    """Compiles one denoiser, on ``device``, with the LoRAs that are active among ``adapters``.

    ``name``: what a measurement is valid for (chip, versions, model); "" where ``denoiser`` is None.
    """

    def __init__(self, denoiser: Any, device: str, adapters: Adapters) -> None:
        self._denoiser, self._adapters = denoiser, adapters
        self._installed = False
        self.device = device
        self.name = "" if denoiser is None else _describe(denoiser, device)

    def install(self, cache: CompileCache) -> None:
        """Set up the compiler once: for the whole denoiser, or for its block where it repeats a block."""
        if self._installed:
            return
        import torch
        from torch._logging import set_logs

        cache.open()
        self._installed = True
        torch.compiler.config.recompile_limit = _MAX_RECOMPILATIONS
        set_logs(all=logging.ERROR)  # TORCH_LOGS overrides this
        # UNets declare their attention blocks as repeated, too; their convolutions would stay uncompiled.
        repeats = getattr(self._denoiser, "_repeated_blocks", None) and not hasattr(self._denoiser, "conv_in")
        compile_ = self._denoiser.compile_repeated_blocks if repeats else self._denoiser.compile
        compile_(fullgraph=True, dynamic=False)

    @contextlib.contextmanager
    def stance(self, *, compiled: bool) -> Iterator[None]:
        """Run the denoiser compiled within the context, or as if it had never been compiled."""
        if not self._installed:
            yield
            return
        import torch

        lora_buffers = self._adapters.use_buffers() if compiled else contextlib.nullcontext()
        with lora_buffers, torch.compiler.set_stance("default" if compiled else "force_eager"):
            yield

    def lora_capacity(self) -> LoraCapacity | None:
        """Return what the active LoRAs need, which selects the code they run on; None if too much."""
        return self._adapters.capacity()

    @property
    def graphs(self) -> int:
        """Graphs that torch has compiled so far in this process."""
        if not self._installed:
            return 0
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])

    def close(self) -> None:
        """Discard the compiled code, which holds the denoiser's weights."""
        if self._installed:
            import torch

            torch.compiler.reset()


def _describe(denoiser: Any, device: str) -> str:
    import diffusers
    import torch

    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    weights = sum(weight.numel() for weight in denoiser.parameters())
    model = f"{type(denoiser).__name__} of {weights:,} weights in {denoiser.dtype}"
    return f"{device} {chip}; torch {torch.__version__}, diffusers {diffusers.__version__}; {model}"


logger = logging.getLogger(__name__)
_FILE_NAME: Final = "text2img-measured.json"


class CompileCache:
    """Keeps estimates by key in ``folder``; without a folder it stays empty."""

    def __init__(self, folder: str | None) -> None:
        self._folder = expand_home(folder, "--compile-cache (COMPILE_CACHE)").absolute() if folder else None

    def check(self) -> None:
        """Raise ConfigurationError if the folder cannot be created or written to; creates nothing."""
        if self._folder is None:
            return
        existing = next(path for path in (self._folder, *self._folder.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigurationError(
                f"--compile-cache (COMPILE_CACHE): {self._folder} cannot be written to; use another folder,"
                " or none"
            )

    def open(self) -> None:
        """Make torch keep its compiled code in the folder; raise OSError if that cannot be created."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self._folder)

    def get(self, key: str) -> Estimate | None:
        """Return an earlier run's measurement; None if there is none or its file is unreadable."""
        entry = self._read().get(key)
        try:
            return Estimate(gain=float(entry["gain"]), cost=float(entry["cost"])) if entry else None
        except (TypeError, ValueError, LookupError):
            return None

    def put(self, key: str, estimate: Estimate) -> None:
        """Store an estimate, replacing the key's earlier one; a full disk loses only this estimate."""
        if self._folder is None:
            return
        measurements = self._read() | {key: {"gain": estimate.gain, "cost": estimate.cost}}
        try:
            self._write(self._folder, json.dumps(measurements, indent=1, ensure_ascii=False))
        except OSError as exc:
            logger.warning("the compile measurements could not be kept in %s: %s", self._folder, exc)

    def _read(self) -> dict[str, Any]:
        if self._folder is None:
            return {}
        try:
            content = json.loads((self._folder / _FILE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @staticmethod
    def _write(folder: Path, text: str) -> None:
        """Replace the file atomically: other workers may read it at any time."""
        with tempfile.NamedTemporaryFile("w", dir=folder, encoding="utf-8", delete=False) as file:
            new = Path(file.name)
            try:
                file.write(text)
                file.flush()
                new.replace(folder / _FILE_NAME)
            finally:
                new.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Estimate:
    """The cost of compiling for one shape (``cost``, seconds) and the share of time it saves (``gain``).

    With ``gain`` 0.2 an image takes a fifth less time; a gain below 0 means that compiling slowed it down.
    """

    gain: float
    cost: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gain) and math.isfinite(self.cost) and self.gain < 1 and self.cost >= 0):
            raise ValueError(f"invalid estimate: gain {self.gain}, cost {self.cost} s")


CAUTIOUS = Estimate(gain=0.2, cost=120.0)
"""Assumed before any measurement: two minutes for a fifth, so that ten minutes of work must remain."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The figures of one decision: remaining prompts, seconds each takes uncompiled, and the estimate."""

    prompts: float
    seconds: float
    estimate: Estimate

    @property
    def saved(self) -> float:
        """Seconds that compiling would save."""
        return self.prompts * self.seconds * self.estimate.gain

    @property
    def pays(self) -> bool:
        """True if compiling saves more time than it costs."""
        return self.saved > self.estimate.cost

    def __str__(self) -> str:
        return (
            f"compiling {'pays' if self.pays else 'does not pay'}: {self.prompts:.0f} prompts of this shape"
            f" remain at {self.seconds:.2f} s each; {self.estimate.gain:.0%} of that is {self.saved:.0f} s,"
            f" and compiling takes {self.estimate.cost:.0f} s"
        )


class StepTiming:
    """Mean seconds per denoising step of one prompt. The first batch warms up and is not counted."""

    def __init__(self) -> None:
        self._batches = 0
        self._steps = 0
        self._seconds = 0.0

    def add(self, steps: int, seconds: float) -> None:
        """Add a batch that took ``seconds`` for ``steps``: its prompts times the denoising steps of each."""
        self._batches += 1
        if self._batches > 1:
            self._steps += steps
            self._seconds += seconds

    @property
    def counted(self) -> int:
        """Batches that the mean covers."""
        return max(0, self._batches - 1)

    @property
    def seconds_per_step(self) -> float | None:
        """Mean seconds per step of one prompt; None before a batch was counted."""
        return self._seconds / self._steps if self._steps else None


class BatchTimings:
    """Prompts seen per shape, and the times of their batches with and without compiling."""

    def __init__(self) -> None:
        self._seen: Counter[Hashable] = Counter()
        self._step_timings: defaultdict[tuple[Hashable, int, bool], StepTiming] = defaultdict(StepTiming)

    def add_seen(self, shape: Hashable, prompts: int) -> None:
        """Count prompts of the shape. The remaining prompts are assumed to have the same distribution."""
        self._seen[shape] += prompts

    def remaining(self, shape: Hashable, size: int, total: int, steps: int) -> tuple[float, float] | None:
        """Return how many prompts of the shape are expected, and the seconds each takes uncompiled.

        They run in batches of ``size``, with ``steps`` steps each; ``total`` counts the remaining prompts of
        all shapes. Returns None before such a batch was counted.
        """
        seconds_per_step = self._step_timings[shape, size, False].seconds_per_step
        if seconds_per_step is None:
            return None
        return total * self._seen[shape] / max(1, self._seen.total()), seconds_per_step * steps

    def add_timing(
        self, shape: Hashable, size: int, steps: int, seconds: float, *, compiled: bool
    ) -> float | None:
        """Add a batch's time; return the gain of compiling when this is the first batch that measures it.

        ``steps``: the steps of one prompt.
        """
        timing = self._step_timings[shape, size, compiled]
        timing.add(size * steps, seconds)
        before, after = self._step_timings[shape, size, False].seconds_per_step, timing.seconds_per_step
        return 1 - after / before if compiled and timing.counted == 1 and after and before else None


if TYPE_CHECKING:
    WarmupRun = Callable[[Sequence[Request]], None]


_MEMORY_KINDS = (FailureKind.MEMORY, FailureKind.UNCLEAR)
"""Failures after which the denoiser runs uncompiled or in fewer rows; a device that has failed shows then."""


class Shape(NamedTuple):
    """Everything that determines the shapes and kinds of the denoiser's inputs, except the batch size.

    ``lora_capacity``: what its LoRAs need; None where it exceeds what can be compiled.
    """

    width: int
    height: int
    chunks: int
    guided: bool
    scheduler: str | None
    lora_capacity: LoraCapacity | None

    @classmethod
    def of(cls, request: Request, lora_capacity: LoraCapacity | None) -> Shape:
        """Return the shape of a request."""
        parameters = request.parameters
        guided = (parameters.guidance_scale or 0) > 1
        return cls(
            parameters.width, parameters.height, request.chunks, guided, parameters.scheduler, lora_capacity
        )

    def __str__(self) -> str:
        capacity = self.lora_capacity
        loras = f" with LoRAs of rank {capacity.rank} in {capacity.layers} layers" if capacity else ""
        return f"{self.width}×{self.height}{loras}"

    @property
    def uses_loras(self) -> bool:
        """True if LoRAs change the denoiser."""
        return self.lora_capacity is None or self.lora_capacity.rank > 0


class CompilePolicy:
    """Compiles one denoiser, shape by shape; used from the thread that owns the device.

    Without a denoiser it compiles nothing. Nor does it with ``auto`` on a device other than ``cuda``, where
    compiling takes longer and saves less. ``recompilations`` counts compilations while images were
    generated, which should not happen. ``key_suffix`` names what else a measurement depends on; ``clock``
    measures the time.
    """

    def __init__(
        self,
        compiler: Compiler,
        mode: Compile,
        cache: CompileCache,
        key_suffix: str = "",
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        has_denoiser = bool(compiler.name)
        if not has_denoiser and mode == "always":
            logger.info("not compiling: the denoiser of a pipeline of this kind is unknown")
        enabled = has_denoiser and (mode != "auto" or compiler.device == "cuda")
        self._mode: Compile = mode if enabled else "never"
        self._compiler, self._cache, self._key_suffix = compiler, cache, key_suffix
        self._clock = clock
        self._timings = BatchTimings()
        self._costs: dict[tuple[Shape, int], float] = {}
        self._excluded: set[tuple[Shape, int]] = set()
        self._logged: set[tuple[Shape, int]] = set()
        self._loras_disabled = False
        self.recompilations = 0

    @property
    def enabled(self) -> bool:
        """True if anything may be compiled."""
        return self._mode != "never"

    def warm_up(
        self, part: Sequence[Request], remaining: int, max_rows: int | None, warmup_run: WarmupRun
    ) -> None:
        """Compile for parts like this one where that pays; ``warmup_run`` runs the denoiser on the part.

        A part is what runs at once of a batch. ``max_rows``: how many rows fit into memory, None if unknown.
        Raises DeviceFailed when the device has failed. Any other failure is logged, and the denoiser runs
        uncompiled.
        """
        shape, size = self._shape(part), len(part)
        self._timings.add_seen(shape, size)
        if not self.enabled or self._is_excluded(shape, size) or self._compiled_sizes(shape, size, max_rows):
            return
        if self._mode == "always" or self._is_worthwhile(part, remaining):
            self._compile(part, warmup_run)

    @contextlib.contextmanager
    def running(self, part: Sequence[Request], max_rows: int | None) -> Iterator[int]:
        """Run the part within the context, which yields the number of rows to run it in.

        The rows exceed the requests where a compiled size is larger than the part. Where they would be twice
        as many or more, the part runs uncompiled at its own size: that is cheaper and compiles nothing.
        """
        shape = self._shape(part)
        sizes = self._compiled_sizes(shape, len(part), max_rows)
        compiled = next((size for size in sizes if size < 2 * len(part)), None)
        graphs, started = self._compiler.graphs, self._clock()
        try:
            with self._compiler.stance(compiled=compiled is not None):
                yield compiled or len(part)
        except Exception as exc:
            if compiled is not None and classify_error(exc) in _MEMORY_KINDS:
                del self._costs[shape, compiled]
            raise
        self._count_recompilations(self._compiler.graphs - graphs)
        if compiled in (None, len(part)):
            self._add_timing(part, self._clock() - started, compiled=compiled is not None)

    def close(self) -> None:
        """Discard the compiled code, which holds the denoiser's weights."""
        self._compiler.close()

    def _is_excluded(self, shape: Shape, size: int) -> bool:
        """Return True if such a part is known not to compile, or not to benefit from it."""
        if shape.lora_capacity is None and (shape, 0) not in self._logged:
            logger.info("running uncompiled: LoRAs of this rank or in these layers cannot be compiled")
            self._logged.add((shape, 0))
        excluded = (shape, size) in self._excluded
        return excluded or shape.lora_capacity is None or (shape.uses_loras and self._loras_disabled)

    def _shape(self, part: Sequence[Request]) -> Shape:
        return Shape.of(part[0], self._compiler.lora_capacity())

    def _compiled_sizes(self, shape: Shape, size: int, max_rows: int | None) -> list[int]:
        """Return the compiled sizes that fit ``size`` requests of the shape, the smallest first."""
        compiled = sorted(compiled_size for other, compiled_size in self._costs if other == shape)
        return [rows for rows in compiled if size <= rows <= (max_rows or rows)]

    def _is_worthwhile(self, part: Sequence[Request], remaining: int) -> bool:
        shape, size = key = self._shape(part), len(part)
        prompts_and_seconds = self._timings.remaining(
            shape, size, remaining, part[0].parameters.num_inference_steps
        )
        if prompts_and_seconds is None:
            return False
        estimate = self._cache.get(self._key(shape, size))
        decision = Decision(*prompts_and_seconds, estimate or CAUTIOUS)
        self._log_decision(key, decision, measured=estimate is not None)
        return decision.pays

    def _log_decision(self, key: tuple[Shape, int], decision: Decision, *, measured: bool) -> None:
        if key not in self._logged or decision.pays:
            source = "measured in an earlier run" if measured else "assumed, as nothing was measured yet"
            logger.info("%s (both %s)", decision, source)
            self._logged.add(key)

    def _compile(self, part: Sequence[Request], warmup_run: WarmupRun) -> None:
        shape, size = self._shape(part), len(part)
        started = self._clock()
        failure = self._attempt(part, warmup_run)
        if failure is None:
            cost = self._costs[shape, size] = self._clock() - started
            logger.info("compiled for %d images of %s in %.0f s", size, shape, cost)
            return
        kind, message = failure
        if kind is FailureKind.DEVICE:
            raise DeviceFailed(f"the device has failed: {message}")
        if kind in _MEMORY_KINDS:
            free_caches()
            self._excluded.add((shape, size))
            logger.info(
                "not enough memory to compile for %d images; batches of this size run uncompiled", size
            )
            return
        if shape.uses_loras:
            self._loras_disabled = True
            logger.warning("compiling with LoRAs failed; batches with LoRAs run uncompiled: %s", message)
            return
        self._mode = "never"
        self._costs.clear()
        logger.warning("compiling failed; the model runs uncompiled: %s", message)

    def _attempt(self, part: Sequence[Request], warmup_run: WarmupRun) -> tuple[FailureKind, str] | None:
        """Compile; return the failure's kind and message, or None.

        The exception itself is dropped: its traceback holds the tensors of all its frames.
        """
        try:
            self._compiler.install(self._cache)
            with self._compiler.stance(compiled=True):
                warmup_run(part)
        except Text2ImgError:
            raise
        except Exception as exc:
            logger.debug("compiling failed", exc_info=True)
            return classify_error(exc), one_line(exc)
        return None

    def _count_recompilations(self, graphs: int) -> None:
        if graphs:
            self.recompilations += graphs
            logger.warning("the denoiser was recompiled for a batch of a shape that was compiled before")

    def _add_timing(self, part: Sequence[Request], seconds: float, *, compiled: bool) -> None:
        """Record how long a part took; the first counted compiled batch yields the measured gain."""
        shape, size, steps = self._shape(part), len(part), part[0].parameters.num_inference_steps
        gain = self._timings.add_timing(shape, size, steps, seconds, compiled=compiled)
        if gain is not None:
            self._store_measurement(shape, size, gain)

    def _store_measurement(self, shape: Shape, size: int, gain: float) -> None:
        logger.info("compiling saves %.0f %% of the time per image", 100 * gain)
        self._cache.put(self._key(shape, size), Estimate(gain=gain, cost=self._costs[shape, size]))
        if gain <= 0 and self._mode == "auto":
            del self._costs[shape, size]
            self._excluded.add((shape, size))

    def _key(self, shape: Shape, size: int) -> str:
        """Return what a measurement is valid for: chip, versions, model, shape and size."""
        kind = f"{shape}, {shape.chunks} chunks, guided {shape.guided}"
        return f"{self._compiler.name}; {size} of {kind}, scheduler {shape.scheduler}{self._key_suffix}"
