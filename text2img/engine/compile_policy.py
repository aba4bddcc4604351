"""When the denoiser is compiled, and which batches run on what was compiled.

``torch.compile`` makes code for one size and shape: it takes minutes and then saves a share of every batch's
time. Batches whose shape was chosen run compiled, filled up to the compiled size where they are smaller, so
that nothing is compiled twice; all others run as they are, as after a failure all do. Batches with LoRAs
have code of their own, which all LoRAs share that need no more room than it was made for. How to draw a batch
is not known here, nor whether compiling pays (see ``breakeven``), nor how to compile (see ``compiler``).
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, NamedTuple

from text2img.engine.compile_cost import CAUTIOUS, Decision, Estimate, Ledger
from text2img.engine.devices import Trouble, free_caches, one_line, trouble
from text2img.errors import DeviceFailed, Text2ImgError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from text2img.engine.compile_cache import CompileCache
    from text2img.engine.compiler import Compiler
    from text2img.engine.lora_slots import Room
    from text2img.engine.options import Compile
    from text2img.prompts import Request

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
    room: Room | None

    @classmethod
    def of(cls, request: Request, room: Room | None) -> Shape:
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


class Compiling:
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
        self._ledger = Ledger()
        self._costs: dict[tuple[Shape, int], float] = {}
        self._refused: set[tuple[Shape, int]] = set()
        self._told: set[tuple[Shape, int]] = set()
        self._without_loras = False
        self.recompilations = 0

    @property
    def runs(self) -> bool:
        """Whether anything may be compiled."""
        return self._mode != "never"

    def warm(self, part: Sequence[Request], left: int, most: int | None, rehearse: Rehearse) -> None:
        """Compile for parts like this one where that pays, by letting ``rehearse`` draw it.

        ``most``: how many rows fit into memory, where that is known. Raises DeviceFailed when the device has
        failed; any other failure is a line in the log, and the denoiser runs uncompiled.
        """
        shape, size = self._shape(part), len(part)
        self._ledger.came(shape, size)
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
            if compiled is not None and trouble(exc) is Trouble.MEMORY:
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
        ahead = self._ledger.ahead(shape, size, left, part[0].parameters.num_inference_steps)
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
        kind, sentence = failure
        if kind is Trouble.DEVICE:
            raise DeviceFailed(f"the device has failed: {sentence}")
        if kind is Trouble.MEMORY:
            free_caches()
            self._refused.add((shape, size))
            logger.info("compiling for %d pictures needs more memory than there is; they run as before", size)
            return
        if shape.adapted:
            self._without_loras = True
            logger.warning(
                "the model cannot be compiled with LoRAs here; with them it runs as it is: %s", sentence
            )
            return
        self._mode = "never"
        self._costs.clear()
        logger.warning("the model cannot be compiled here and runs uncompiled: %s", sentence)

    def _attempt(self, part: Sequence[Request], rehearse: Rehearse) -> tuple[Trouble, str] | None:
        """What went wrong; no more of it is kept, as a traceback holds the tensors of all its frames."""
        try:
            self._compiler.install(self._cache)
            with self._compiler.stance(compiled=True):
                rehearse(part)
        except Text2ImgError:
            raise
        except Exception as exc:
            logger.debug("compiling failed", exc_info=True)
            return trouble(exc), one_line(exc)
        return None

    def _count(self, graphs: int) -> None:
        if graphs:
            self.recompilations += graphs
            logger.warning("the denoiser was compiled again, though its batch was of a compiled shape")

    def _took(self, part: Sequence[Request], seconds: float, *, compiled: bool) -> None:
        """Remember how long a part took; the first one counted on compiled code tells what that brought."""
        shape, size, steps = self._shape(part), len(part), part[0].parameters.num_inference_steps
        gain = self._ledger.took(shape, size, steps, seconds, compiled=compiled)
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
