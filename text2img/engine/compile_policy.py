"""Whether compiling pays: seconds it costs against seconds it will save. No torch, no clock, no files.

Compiling takes ``cost`` seconds once and then saves ``gain`` of every picture's denoising. It pays when the
pictures that are left are worth more than it costs: left · seconds each · gain > cost.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from text2img.engine.devices import FailureKind, classify_error, free_caches, one_line
from text2img.errors import DeviceFailed, Text2ImgError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from text2img.engine import Compile
    from text2img.engine.compiler import CompileCache, Compiler
    from text2img.engine.lora_adapters import LoraCapacity
    from text2img.prompts import Request


@dataclass(frozen=True, slots=True)
class Estimate:
    """What compiling for one shape costs (``cost``, seconds) and brings (``gain``, a share of the time).

    ``gain`` 0.2 means that a picture then takes a fifth less; below 0 that compiling slowed it down.
    """

    gain: float
    cost: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gain) and math.isfinite(self.cost) and self.gain < 1 and self.cost >= 0):
            raise ValueError(f"no estimate: {self.gain} of the time, {self.cost} s")


CAUTIOUS = Estimate(gain=0.2, cost=120.0)
"""Where nothing was ever measured: two minutes for a fifth, so that ten minutes of work must be left."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The figures of one decision: ``prompts`` left that take ``seconds`` each, and what is expected."""

    prompts: float
    seconds: float
    estimate: Estimate

    @property
    def saved(self) -> float:
        """Seconds that compiling would save."""
        return self.prompts * self.seconds * self.estimate.gain

    @property
    def pays(self) -> bool:
        """Whether more is saved than spent."""
        return self.saved > self.estimate.cost

    def __str__(self) -> str:
        return (
            f"compiling {'pays' if self.pays else 'does not pay'}: {self.prompts:.0f} prompts of this shape"
            f" are left at {self.seconds:.2f} s each; {self.estimate.gain:.0%} of that is {self.saved:.0f} s,"
            f" and compiling takes {self.estimate.cost:.0f} s"
        )


class Pace:
    """Seconds that one step of one prompt takes. The first batch warms up and is not counted."""

    def __init__(self) -> None:
        self._batches = 0
        self._steps = 0
        self._seconds = 0.0

    def add(self, steps: int, seconds: float) -> None:
        """A batch took ``seconds`` for ``steps``: its prompts times the denoising steps of each."""
        self._batches += 1
        if self._batches > 1:
            self._steps += steps
            self._seconds += seconds

    @property
    def counted(self) -> int:
        """Batches that the pace is the mean of."""
        return max(0, self._batches - 1)

    @property
    def step(self) -> float | None:
        """Seconds a step of a prompt, the mean; None before a batch was counted."""
        return self._seconds / self._steps if self._steps else None


class BatchTimings:
    """What came in each shape, and what its batches took with and without compiling."""

    def __init__(self) -> None:
        self._seen: Counter[Hashable] = Counter()
        self._paces: defaultdict[tuple[Hashable, int, bool], Pace] = defaultdict(Pace)

    def add_seen(self, shape: Hashable, prompts: int) -> None:
        """So many prompts of the shape came: of those that are left, the same share will be of it."""
        self._seen[shape] += prompts

    def remaining(self, shape: Hashable, size: int, left: int, steps: int) -> tuple[float, float] | None:
        """How many prompts of the shape are still to be made, and the seconds each takes uncompiled.

        In batches of ``size``, with ``steps`` steps each; ``left`` counts the prompts of all shapes. None
        before such a batch was counted.
        """
        step = self._paces[shape, size, False].step
        if step is None:
            return None
        return left * self._seen[shape] / max(1, self._seen.total()), step * steps

    def add_timing(
        self, shape: Hashable, size: int, steps: int, seconds: float, *, compiled: bool
    ) -> float | None:
        """A batch took so long; its gain over not compiling when this is the first batch to tell it.

        ``steps``: those of one prompt.
        """
        pace = self._paces[shape, size, compiled]
        pace.add(size * steps, seconds)
        before = self._paces[shape, size, False].step
        return 1 - pace.step / before if compiled and pace.counted == 1 and pace.step and before else None


if TYPE_CHECKING:
    Rehearse = Callable[[Sequence[Request]], None]

logger = logging.getLogger(__name__)


class Shape(NamedTuple):
    """What decides the shapes and kinds of all that goes into the denoiser, but for the batch's size.

    ``room``: what its LoRAs need; None where it is more than can be compiled for.
    """

    width: int
    height: int
    chunks: int
    guided: bool
    scheduler: str | None
    room: LoraCapacity | None

    @classmethod
    def of(cls, request: Request, room: LoraCapacity | None) -> Shape:
        """The shape that a request is drawn in."""
        wanted = request.parameters
        guided = wanted.guidance_scale > 1
        return cls(wanted.width, wanted.height, request.chunks, guided, wanted.scheduler, room)

    def __str__(self) -> str:
        loras = f" with LoRAs of rank {self.room.rank} in {self.room.layers} layers" if self.room else ""
        return f"{self.width}×{self.height}{loras}"

    @property
    def adapted(self) -> bool:
        """Whether LoRAs change the denoiser."""
        return self.room is None or self.room.rank > 0


class CompilePolicy:
    """Compiles one denoiser, shape by shape; used from the thread that owns the device.

    Without a denoiser nothing is. With ``auto`` nothing is compiled on a device other than
    ``cuda``: elsewhere it takes longer and brings less. ``recompilations`` counts what was compiled while
    pictures were drawn, where nothing should be. ``about`` is what else a measurement depends on, ``clock``
    what it is made with.
    """

    def __init__(
        self,
        compiler: Compiler,
        mode: Compile,
        cache: CompileCache,
        about: str = "",
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        known = bool(compiler.name)
        if not known and mode == "always":
            logger.info("a pipeline of this kind is not compiled: it is not known what its denoiser is")
        runs = known and (mode != "auto" or compiler.device == "cuda")
        self._mode: Compile = mode if runs else "never"
        self._compiler, self._cache, self._about = compiler, cache, about
        self._clock = clock
        self._ledger = BatchTimings()
        self._costs: dict[tuple[Shape, int], float] = {}
        self._refused: set[tuple[Shape, int]] = set()
        self._told: set[tuple[Shape, int]] = set()
        self._without_loras = False
        self.recompilations = 0

    @property
    def runs(self) -> bool:
        """Whether anything may be compiled."""
        return self._mode != "never"

    def warm_up(self, part: Sequence[Request], left: int, most: int | None, rehearse: Rehearse) -> None:
        """Compile for parts like this one where that pays, by letting ``rehearse`` draw it.

        ``most``: how many rows fit into memory, where that is known. Raises DeviceFailed when the device has
        failed; any other failure is a line in the log, and the denoiser runs uncompiled.
        """
        shape, size = self._shape(part), len(part)
        self._ledger.add_seen(shape, size)
        if not self.runs or self._hopeless(shape, size) or self._sizes(shape, size, most):
            return
        if self._mode == "always" or self._pays(part, left):
            self._compile(part, rehearse)

    @contextlib.contextmanager
    def running(self, part: Sequence[Request], most: int | None) -> Iterator[int]:
        """Draw the part within; gives the rows to draw it in.

        They are more than the requests where the part is smaller than what was compiled. Where they would
        be twice as many or more, the part is drawn as it is: that costs less, and compiles nothing either.
        """
        shape = self._shape(part)
        compiled = next((one for one in self._sizes(shape, len(part), most) if one < 2 * len(part)), None)
        graphs, begun = self._compiler.graphs, self._clock()
        try:
            with self._compiler.stance(compiled=compiled is not None):
                yield compiled or len(part)
        except Exception as exc:
            if compiled is not None and classify_error(exc) is FailureKind.MEMORY:
                del self._costs[shape, compiled]
            raise
        self._count(self._compiler.graphs - graphs)
        if compiled in (None, len(part)):
            self._took(part, self._clock() - begun, compiled=compiled is not None)

    def close(self) -> None:
        """Forget what was compiled, which holds the denoiser's weights."""
        self._compiler.close()

    def _hopeless(self, shape: Shape, size: int) -> bool:
        """Whether it is known that nothing can be compiled for such a part, or that it brings nothing."""
        if shape.room is None and (shape, 0) not in self._told:
            logger.info("LoRAs of so high a rank, or of such layers, run uncompiled")
            self._told.add((shape, 0))
        refused = (shape, size) in self._refused
        return refused or shape.room is None or (shape.adapted and self._without_loras)

    def _shape(self, part: Sequence[Request]) -> Shape:
        return Shape.of(part[0], self._compiler.room())

    def _sizes(self, shape: Shape, size: int, most: int | None) -> list[int]:
        """The compiled sizes that ``size`` requests of the shape could run in, the smallest first."""
        known = sorted(one for of, one in self._costs if of == shape)
        return [one for one in known if size <= one <= (most or one)]

    def _pays(self, part: Sequence[Request], left: int) -> bool:
        shape, size = key = self._shape(part), len(part)
        ahead = self._ledger.remaining(shape, size, left, part[0].parameters.num_inference_steps)
        if ahead is None:
            return False
        estimate = self._cache.recall(self._key(shape, size))
        decision = Decision(*ahead, estimate or CAUTIOUS)
        self._tell(key, decision, known=estimate is not None)
        return decision.pays

    def _tell(self, key: tuple[Shape, int], decision: Decision, *, known: bool) -> None:
        if key not in self._told or decision.pays:
            source = "measured in an earlier run" if known else "assumed, as nothing was measured yet"
            logger.info("%s (both %s)", decision, source)
            self._told.add(key)

    def _compile(self, part: Sequence[Request], rehearse: Rehearse) -> None:
        shape, size = self._shape(part), len(part)
        begun = self._clock()
        failure = self._attempt(part, rehearse)
        if failure is None:
            cost = self._costs[shape, size] = self._clock() - begun
            logger.info("compiled for %d pictures of %s in %.0f s", size, shape, cost)
            return
        kind, message = failure
        if kind is FailureKind.DEVICE:
            raise DeviceFailed(f"the device has failed: {message}")
        if kind is FailureKind.MEMORY:
            free_caches()
            self._refused.add((shape, size))
            logger.info("compiling for %d pictures needs more memory than there is; they run as before", size)
            return
        if shape.adapted:
            self._without_loras = True
            logger.warning(
                "the model cannot be compiled with LoRAs here; with them it runs as it is: %s", message
            )
            return
        self._mode = "never"
        self._costs.clear()
        logger.warning("the model cannot be compiled here and runs uncompiled: %s", message)

    def _attempt(self, part: Sequence[Request], rehearse: Rehearse) -> tuple[FailureKind, str] | None:
        """What went wrong; no more of it is kept, as a traceback holds the tensors of all its frames."""
        try:
            self._compiler.install(self._cache)
            with self._compiler.stance(compiled=True):
                rehearse(part)
        except Text2ImgError:
            raise
        except Exception as exc:
            logger.debug("compiling failed", exc_info=True)
            return classify_error(exc), one_line(exc)
        return None

    def _count(self, graphs: int) -> None:
        if graphs:
            self.recompilations += graphs
            logger.warning("the denoiser was compiled again, though its batch was of a compiled shape")

    def _took(self, part: Sequence[Request], seconds: float, *, compiled: bool) -> None:
        """Remember how long a part took; the first one counted on compiled code tells what that brought."""
        shape, size, steps = self._shape(part), len(part), part[0].parameters.num_inference_steps
        gain = self._ledger.add_timing(shape, size, steps, seconds, compiled=compiled)
        if gain is not None:
            self._measured(shape, size, gain)

    def _measured(self, shape: Shape, size: int, gain: float) -> None:
        logger.info("compiled, a picture takes %.0f %% less time", 100 * gain)
        self._cache.remember(self._key(shape, size), Estimate(gain=gain, cost=self._costs[shape, size]))
        if gain <= 0 and self._mode == "auto":
            del self._costs[shape, size]
            self._refused.add((shape, size))

    def _key(self, shape: Shape, size: int) -> str:
        """What a measurement holds for: chip, versions, model, shape and size."""
        kind = f"{shape}, {shape.chunks} chunks, guided {shape.guided}"
        return f"{self._compiler.name}; {size} of {kind}, scheduler {shape.scheduler}{self._about}"
