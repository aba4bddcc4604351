"""The engine that runs models with diffusers: one pipeline on one device.

Imports torch and diffusers only inside its methods, and only once there is work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from typing import TYPE_CHECKING, Any

from text2img.engine import ModelInfo, Picture
from text2img.engine.compiler import CompileCache
from text2img.engine.decoding import replace_autoencoder
from text2img.engine.deepcache import check_unet, install
from text2img.engine.denoiser import BatchSplitter, StepCounter
from text2img.engine.devices import (
    check_device,
    choose_device,
    choose_dtype,
    free_caches,
    peak_memory,
    silence_libraries,
    suppress_warnings,
    wait_for,
)
from text2img.engine.hub import find
from text2img.engine.inspection import check_fits, check_model, model_info
from text2img.engine.loading import check_offload, choose_offload, offload, weights_on_host
from text2img.engine.model_folder import ModelFolder, read_folder
from text2img.errors import PromptFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from text2img.engine import EngineOptions
    from text2img.engine.compile_policy import CompilePolicy
    from text2img.engine.decoding import Decoder
    from text2img.engine.denoiser import Denoiser
    from text2img.engine.lora_adapters import Adapters
    from text2img.engine.model_folder import Schedulers
    from text2img.prompts import Request

    Find = Callable[[EngineOptions], tuple[Path, str | None]]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """A model that passed inspection."""

    folder: ModelFolder
    variants: Mapping[str, str | None]
    model_info: ModelInfo


@dataclasses.dataclass(frozen=True, slots=True)
class _Loaded:
    """What draws, once the weights are on the device."""

    adapters: Adapters
    draughtsman: Denoiser
    decoder: Decoder
    schedulers: Schedulers
    parts: BatchSplitter
    compiling: CompilePolicy
    pipe: Any
    offload: Callable[[], None] | None
    """Lets the weights wait in the host's memory; None where they are on the device."""


class DiffusersEngine:
    """Implements ``text2img.engine.Engine``; its promises stand there."""

    def __init__(self, options: EngineOptions, find: Find = find) -> None:
        """``find`` gets the model to this machine; by default from the hub, where it is no folder."""
        self._options, self._find = options, find
        self._seconds = {"load": 0.0, "compile": 0.0, "denoise": 0.0, "decode": 0.0}
        self._cache = CompileCache(options.compile_cache)
        self._found: _Found | None = None
        self._loaded: _Loaded | None = None

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds spent so far, by stage; ``denoise`` counts reading the prompts in."""
        return dict(self._seconds)

    def inspect(self) -> ModelInfo:
        """Find the model, fetching it from the hub where it is there, and check it; see Engine."""
        return self._inspected().model_info

    def load(self) -> None:
        """Put the weights on the device; see Engine. A second call does nothing."""
        if self._loaded is None:
            found = self._inspected()
            with self._timed("load"), suppress_warnings():
                silence_libraries()
                self._loaded = self._load(found)

    def prepare(self, request: Request) -> Request:
        """The request with its chunks counted, or PromptFailed; see Engine."""
        found, loaded = self._inspected(), self._running()
        check_fits(found.model_info, request.parameters)
        return dataclasses.replace(request, chunks=loaded.draughtsman.chunks(request))

    def warm_up(self, batch: Sequence[Request], left: int) -> None:
        """Compile for batches like this one where that pays; see Engine."""
        if batch:
            loaded = self._running()
            part, most = batch[: loaded.parts.size(batch)], loaded.parts.most(batch[0])
            with suppress_warnings():
                if loaded.compiling.runs and self._activate_loras(loaded, part[0]):
                    loaded.compiling.warm_up(part, left, most, self._warmup_run)

    def generate(
        self, batch: Sequence[Request], on_step: Callable[[int, int], None]
    ) -> list[Picture | PromptFailed]:
        """A picture or the reason for none, for each request; see Engine."""
        if not batch:
            return []
        steps = StepCounter(on_step, len(batch), batch[0].parameters.num_inference_steps)
        with suppress_warnings():
            return self._running().parts.draw(batch, steps)

    @property
    def recompilations(self) -> int:
        """How often something was compiled while pictures were drawn; ``warm`` leaves nothing to."""
        return self._running().compiling.recompilations

    def peak_memory(self) -> int:
        """The most bytes held so far; see Engine."""
        return peak_memory()

    def close(self) -> None:
        """Give the weights' memory back; see Engine."""
        if self._loaded is not None:
            self._loaded.compiling.close()
            self._loaded = None
            free_caches()

    def _inspected(self) -> _Found:
        if self._found is None:
            check_device(self._options.device)
            check_offload(self._options)
            self._cache.check()
            path, revision = self._find(self._options)
            folder = read_folder(path, revision, safety_checker=self._options.safety_checker)
            folder, approximations = self._approximated(folder)
            variants = check_model(folder, self._options.variant)
            known = dataclasses.replace(
                model_info(folder, self._options.model), approximations=approximations
            )
            self._found = _Found(folder, variants, known)
        return self._found

    def _approximated(self, folder: ModelFolder) -> tuple[ModelFolder, dict[str, object]]:
        """The model with the approximations that were asked for, which must fit it, and what to record."""
        record: dict[str, object] = {}
        if self._options.feature_cache > 1:
            check_unet(folder)
            record["feature_cache"] = self._options.feature_cache
        if self._options.autoencoder is not None:
            folder, record["autoencoder"] = replace_autoencoder(folder, self._options.autoencoder)
        return folder, record

    def _running(self) -> _Loaded:
        if self._loaded is None:
            raise RuntimeError("the engine is used before load()")
        return self._loaded

    def _load(self, found: _Found) -> _Loaded:
        from text2img.engine.compile_policy import CompilePolicy
        from text2img.engine.compiler import Compiler
        from text2img.engine.decoding import Decoder
        from text2img.engine.denoiser import Denoiser
        from text2img.engine.loading import load_pipeline
        from text2img.engine.lora_adapters import Adapters
        from text2img.engine.model_folder import Schedulers

        device = choose_device(self._options.device)
        dtype = choose_dtype(self._options, device)
        how = choose_offload(self._options, device)
        pipe = load_pipeline(found.folder, found.variants, device, dtype, stay=how != "none")
        logger.info("%s is on %s in %s", found.model_info.name, device, str(dtype).removeprefix("torch."))
        family = found.folder.family
        decoder = Decoder(pipe, family)
        every = self._options.feature_cache
        run = install(pipe.unet, every).run if every > 1 else contextlib.nullcontext
        again = None if how == "none" else functools.partial(offload, pipe, how, device)
        if again:
            again()
        adapters = Adapters(pipe)
        return _Loaded(
            adapters=adapters,
            draughtsman=Denoiser(pipe, family, decoder.wants, run, lambda: adapters.text_lora_key),
            decoder=decoder,
            schedulers=Schedulers(pipe.scheduler, flow=family.flow),
            parts=BatchSplitter(self._draw, free_caches),
            compiling=CompilePolicy(
                Compiler(getattr(pipe, family.denoiser, None), device, adapters),
                self._options.compile if how == "none" else "never",
                self._cache,
                f", feature cache {every}" if every > 1 else "",
            ),
            pipe=pipe,
            offload=again,
        )

    def _activate_loras(self, loaded: _Loaded, request: Request) -> bool:
        """Whether the request's LoRAs are active; why not, drawing it will meet again, and tell."""
        try:
            with self._timed("load"):
                loaded.adapters.use(request)
        except Exception:
            logger.debug("not compiled for", exc_info=True)
            return False
        return True

    def _warmup_run(self, part: Sequence[Request]) -> None:
        """Draw two steps of the part, of which nothing is kept."""
        loaded, wanted = self._running(), part[0].parameters
        few = min(2, wanted.num_inference_steps)
        short = [
            dataclasses.replace(one, parameters=dataclasses.replace(one.parameters, num_inference_steps=few))
            for one in part
        ]
        with self._timed("compile"):
            scheduler = loaded.schedulers.get(wanted.scheduler)
            output = loaded.draughtsman.draw(
                short, scheduler, StepCounter(_ignore_step, len(part), few), len(part)
            )
            wait_for(output)

    def _draw(self, part: Sequence[Request], steps: StepCounter) -> list[Picture | PromptFailed]:
        """One call of the pipeline, and its pictures."""
        loaded = self._running()
        try:
            with self._timed("load"), weights_on_host(loaded.pipe, loaded.offload):
                loaded.adapters.use(part[0])
            return self._drawn(loaded, part, steps)
        except PromptFailed as exc:  # of its LoRAs
            return [exc] * len(part)
        finally:  # the VAE, and after a failure whatever ran, would else stay on the device
            loaded.pipe.maybe_free_model_hooks()

    def _drawn(
        self, loaded: _Loaded, part: Sequence[Request], steps: StepCounter
    ) -> list[Picture | PromptFailed]:
        wanted = part[0].parameters
        scheduler = loaded.schedulers.get(wanted.scheduler)
        with self._timed("denoise"), loaded.compiling.running(part, loaded.parts.most(part[0])) as rows:
            output = loaded.draughtsman.draw(part, scheduler, steps, rows)
            wait_for(output)
        with self._timed("decode"):
            drawn = loaded.decoder.pictures(output, (wanted.width, wanted.height))
        used = wanted.scheduler or self._inspected().model_info.scheduler
        return [
            result
            if isinstance(result, PromptFailed)
            else Picture(pixels=result, scheduler=used, truncated=loaded.draughtsman.truncated(request))
            for request, result in zip(part, drawn, strict=True)
        ]

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - begun


def _ignore_step(_done: int, _of: int) -> None:
    """Told of the steps that are drawn for nobody."""
