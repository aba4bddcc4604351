"""The engine that runs models with diffusers: one pipeline on one device.

Imports torch and diffusers only inside its methods, and only once there is work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from typing import TYPE_CHECKING, Any

from text2img.engine import ModelCard, Picture
from text2img.engine.devices import check_device, choose_device, choose_dtype, free_caches, peak_memory
from text2img.engine.folder import ModelFolder, read_folder
from text2img.engine.hub import find
from text2img.engine.inspection import card, check_model, largest
from text2img.engine.parts import Parts, Steps
from text2img.engine.quiet import hush, quiet
from text2img.errors import ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from text2img.engine.decoding import Decoder
    from text2img.engine.drawing import Draughtsman
    from text2img.engine.options import EngineOptions
    from text2img.engine.schedulers import Schedulers
    from text2img.prompts import Request

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """A model that passed inspection. ``largest``: the most pixels a side can have, where it has an end."""

    folder: ModelFolder
    variants: Mapping[str, str | None]
    card: ModelCard
    largest: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Loaded:
    """What draws, once the weights are on the device."""

    draughtsman: Draughtsman
    decoder: Decoder
    schedulers: Schedulers
    parts: Parts


class DiffusersEngine:
    """Implements ``text2img.engine.Engine``; its promises stand there."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._seconds = {"load": 0.0, "denoise": 0.0, "decode": 0.0}
        self._found: _Found | None = None
        self._loaded: _Loaded | None = None

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds spent so far, by stage: ``load``, ``denoise`` (with reading the prompts), ``decode``."""
        return dict(self._seconds)

    def inspect(self) -> ModelCard:
        """Find the model, fetching it from the hub where it is there, and check it; see Engine."""
        return self._inspected().card

    def load(self) -> None:
        """Put the weights on the device; see Engine. A second call does nothing."""
        if self._loaded is None:
            found = self._inspected()
            with self._timed("load"), quiet():
                hush()
                self._loaded = self._load(found)

    def prepare(self, request: Request) -> Request:
        """The request with its chunks counted, or PromptFailed; see Engine."""
        found, loaded = self._inspected(), self._running()
        wanted = request.parameters
        for name, pixels in (("width", wanted.width), ("height", wanted.height)):
            _check_side(name, pixels, found)
        if wanted.scheduler is not None and wanted.scheduler not in found.card.schedulers:
            raise _refused(f"scheduler {wanted.scheduler} does not fit this model; {_known(found.card)}")
        with quiet():
            longest = loaded.schedulers.longest_run(wanted.scheduler)
        if wanted.num_inference_steps > longest:
            raise _refused(
                f"num_inference_steps must be at most {longest} with this scheduler; it is"
                f" {wanted.num_inference_steps}"
            )
        return dataclasses.replace(request, chunks=loaded.draughtsman.chunks(request))

    def generate(
        self, batch: Sequence[Request], on_step: Callable[[int, int], None]
    ) -> list[Picture | PromptFailed]:
        """A picture or the reason for none, for each request; see Engine."""
        if not batch:
            return []
        steps = Steps(on_step, len(batch), batch[0].parameters.num_inference_steps)
        with quiet():
            return self._running().parts.draw(batch, steps)

    def peak_memory(self) -> int:
        """The most bytes held so far; see Engine."""
        return peak_memory()

    def _inspected(self) -> _Found:
        if self._found is None:
            check_device(self._options.device)
            path, revision = find(self._options)
            folder = read_folder(path, revision, safety_checker=self._options.safety_checker)
            variants = check_model(folder, self._options.variant)
            self._found = _Found(folder, variants, card(folder, self._options.model), largest(folder))
        return self._found

    def _running(self) -> _Loaded:
        if self._loaded is None:
            raise RuntimeError("the engine is used before load()")
        return self._loaded

    def _load(self, found: _Found) -> _Loaded:
        from text2img.engine.decoding import Decoder
        from text2img.engine.drawing import Draughtsman
        from text2img.engine.loading import load_pipeline
        from text2img.engine.schedulers import Schedulers

        device = choose_device(self._options.device)
        dtype = choose_dtype(self._options, device)
        pipe = load_pipeline(found.folder, found.variants, device, dtype)
        logger.info("%s is on %s in %s", found.card.name, device, str(dtype).removeprefix("torch."))
        family = found.folder.family
        decoder = Decoder(pipe, family)
        return _Loaded(
            draughtsman=Draughtsman(pipe, family, decoder.wants),
            decoder=decoder,
            schedulers=Schedulers(pipe.scheduler, flow=family.flow),
            parts=Parts(self._draw, free_caches),
        )

    def _draw(self, part: Sequence[Request], steps: Steps) -> list[Picture | PromptFailed]:
        """One call of the pipeline, and its pictures."""
        loaded, wanted = self._running(), part[0].parameters
        with self._timed("denoise"):
            output = loaded.draughtsman.draw(part, loaded.schedulers.get(wanted.scheduler), steps)
            _wait_for(output)
        with self._timed("decode"):
            drawn = loaded.decoder.pictures(output, (wanted.width, wanted.height))
        scheduler = wanted.scheduler or self._inspected().card.scheduler
        return [
            result
            if isinstance(result, PromptFailed)
            else Picture(pixels=result, scheduler=scheduler, truncated=loaded.draughtsman.truncated(request))
            for request, result in zip(part, drawn, strict=True)
        ]

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - begun


def _check_side(name: str, pixels: int, found: _Found) -> None:
    multiple = found.card.multiple
    if pixels % multiple:
        near = pixels // multiple * multiple
        raise _refused(
            f"{name} must be a multiple of {multiple} with this model; it is {pixels}, and {near} or"
            f" {near + multiple} would do"
        )
    if found.largest is not None and pixels > found.largest:
        raise _refused(f"{name} must be at most {found.largest} with this model; it is {pixels}")


def _known(model: ModelCard) -> str:
    return f"it takes {', '.join(model.schedulers)}" if model.schedulers else "it takes only its own"


def _refused(sentence: str) -> PromptFailed:
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, sentence)


def _wait_for(output: Any) -> None:
    """Until the device has finished: it is told what to do long before, and the clock must not stop then."""
    if output.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
