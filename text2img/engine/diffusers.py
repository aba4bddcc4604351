"""The engine that runs models with diffusers: one pipeline on one device.

Imports torch and diffusers only inside its methods, when they are first needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import time
from typing import TYPE_CHECKING, Any

from text2img.engine import GeneratedImage, ModelInfo
from text2img.engine.compile_policy import CompileCache
from text2img.engine.deepcache import check_unet, install
from text2img.engine.denoiser import TINY_AUTOENCODER, replace_autoencoder
from text2img.engine.devices import (
    check_device,
    check_dtype,
    check_quantized,
    choose_device,
    choose_dtype,
    find_device_failure,
    free_caches,
    frozen_heap,
    peak_memory,
    silence_libraries,
    suppress_warnings,
    synchronize,
)
from text2img.engine.inspection import check_model, fit, model_info
from text2img.engine.loading import (
    check_offload,
    choose_offload,
    find,
    offload,
    weights_on_host,
)
from text2img.engine.model_folder import ModelFolder, is_stored_in_bf16, read_folder
from text2img.engine.single_file import check_single_file, is_single_file, read_single_file, sources
from text2img.engine.steps import BatchSplitter, StepCounter, own_request
from text2img.errors import ConfigurationError, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from text2img.engine import EngineOptions
    from text2img.engine.compile_policy import CompilePolicy
    from text2img.engine.denoiser import Decoder, Denoiser
    from text2img.engine.lora_adapters import Adapters
    from text2img.engine.schedulers import Schedulers
    from text2img.prompts import Request

    Find = Callable[[EngineOptions], tuple[Path, str | None]]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _InspectedModel:
    """A model that passed inspection."""

    folder: ModelFolder
    variants: Mapping[str, str | None]
    model_info: ModelInfo


@dataclasses.dataclass(frozen=True, slots=True)
class _Loaded:
    """A loaded model: everything that generates images."""

    adapters: Adapters
    denoiser: Denoiser
    decoder: Decoder
    schedulers: Schedulers
    splitter: BatchSplitter
    compile_policy: CompilePolicy
    pipe: Any
    offload: Callable[[], None] | None
    """Moves the weights back to the host's memory; None where they stay on the device."""


class DiffusersEngine:
    """Runs a model with diffusers. Implements ``text2img.engine.Engine``, which documents the methods."""

    def __init__(self, options: EngineOptions, find: Find = find) -> None:
        """Create the engine. ``find`` fetches the model; by default from the hub, unless it is a folder."""
        self._options, self._find = options, find
        self._seconds = {"load": 0.0, "compile": 0.0, "denoise": 0.0, "decode": 0.0}
        self._cache = CompileCache(options.compile_cache)
        self._model: _InspectedModel | None = None
        self._loaded: _Loaded | None = None

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds spent so far, by stage; ``denoise`` includes encoding the prompts."""
        return dict(self._seconds)

    def inspect(self) -> ModelInfo:
        """Find the model, fetching it from the hub if needed, and check it; see Engine."""
        return self._inspect_model().model_info

    def load(self) -> None:
        """Load the weights onto the device; see Engine. A second call does nothing."""
        if self._loaded is None:
            model = self._inspect_model()
            with self._timed("load"), suppress_warnings(), frozen_heap():
                silence_libraries()
                self._loaded = self._load(model)

    def prepare(self, request: Request) -> Request:
        """Return the request as it will be run, or raise PromptFailed; see Engine."""
        model, loaded = self._inspect_model(), self._require_loaded()
        request = fit(model.model_info, request)
        return dataclasses.replace(request, chunks=loaded.denoiser.chunks(request))

    def warm_up(self, batch: Sequence[Request], remaining: int) -> None:
        """Compile for batches like this one where that pays; see Engine."""
        if batch:
            loaded = self._require_loaded()
            part, max_rows = batch[: loaded.splitter.part_size(batch)], loaded.splitter.max_size(batch[0])
            with suppress_warnings():
                if loaded.compile_policy.enabled and self._activate_loras(loaded, part[0]):
                    loaded.compile_policy.warm_up(part, remaining, max_rows, self._warmup_run)

    def generate(
        self, batch: Sequence[Request], on_step: Callable[[int, int], None]
    ) -> list[GeneratedImage | PromptFailed]:
        """Return an image or a failure for each request; see Engine."""
        if not batch:
            return []
        loaded = self._require_loaded()
        steps = StepCounter(on_step, len(batch), batch[0].parameters.num_inference_steps)
        with suppress_warnings(), loaded.denoiser.source.forward_passes(steps):
            return loaded.splitter.generate(batch, steps)

    @property
    def recompilations(self) -> int:
        """Compilations while images were generated; ``warm_up`` should leave none."""
        return self._require_loaded().compile_policy.recompilations

    def peak_memory(self) -> int:
        """Return the peak memory in bytes; see Engine."""
        return peak_memory()

    def close(self) -> None:
        """Free the weights' memory; see Engine."""
        if self._loaded is not None:
            self._loaded.compile_policy.close()
            self._loaded = None
            gc.unfreeze()
            free_caches()

    def _inspect_model(self) -> _InspectedModel:
        if self._model is None:
            check_device(self._options.device)
            check_dtype(self._options)
            check_offload(self._options)
            self._cache.check()
            folder, parts = self._read_folder()
            folder, approximations, replaced = self._apply_approximations(folder)
            variants = check_model(folder, self._options.variant)
            check_quantized(folder, self._options.device)
            check_single_file(folder)
            info = dataclasses.replace(
                model_info(folder, self._options.base or self._options.model),
                name=self._options.model,
                approximations=approximations,
                parts={**parts, **replaced},
                sources=sources(folder, self._options),
            )
            self._model = _InspectedModel(folder, variants, info)
        return self._model

    def _read_folder(self) -> tuple[ModelFolder, dict[str, str]]:
        """Return the model, and what to record of the parts that are not its own."""
        options = self._options
        if is_single_file(options.model):
            return read_single_file(options, self._find)
        if options.base is not None:
            raise ConfigurationError(
                f"--model-base (MODEL_BASE) lends a single file what it lacks, and {options.model} is a whole"
                " model; leave --model-base out"
            )
        path, revision = self._find(options)
        return read_folder(path, revision, safety_checker=options.safety_checker), {}

    def _apply_approximations(
        self, folder: ModelFolder
    ) -> tuple[ModelFolder, dict[str, object], dict[str, object]]:
        """Return the model with the requested approximations and autoencoder.

        The second value are the approximations to record, the third a full autoencoder, which is none.
        Raises ConfigurationError for one that does not fit the model.
        """
        record: dict[str, object] = {}
        replaced: dict[str, object] = {}
        if self._options.feature_cache > 1:
            check_unet(folder)
            record["feature_cache"] = self._options.feature_cache
        if self._options.autoencoder is not None:
            folder, name = replace_autoencoder(folder, self._options.autoencoder)
            tiny = folder.components["vae"].class_name == TINY_AUTOENCODER
            (record if tiny else replaced)["autoencoder"] = name
        return folder, record, replaced

    def _require_loaded(self) -> _Loaded:
        if self._loaded is None:
            raise RuntimeError("load() must be called before the engine is used")
        return self._loaded

    def _load(self, model: _InspectedModel) -> _Loaded:
        from text2img.engine.compile_policy import CompilePolicy, Compiler
        from text2img.engine.denoiser import Decoder, Denoiser
        from text2img.engine.loading import load_pipeline
        from text2img.engine.lora_adapters import Adapters
        from text2img.engine.schedulers import Schedulers

        device = choose_device(self._options.device)
        dtype = choose_dtype(
            self._options, device, stored_bf16=is_stored_in_bf16(model.folder, model.variants)
        )
        mode = choose_offload(self._options, device)
        pipe = load_pipeline(model.folder, model.variants, device, dtype, on_host=mode != "none")
        logger.info("loaded %s on %s in %s", model.model_info.name, device, str(dtype).removeprefix("torch."))
        family = model.folder.family
        decoder = Decoder(pipe, family)
        interval = self._options.feature_cache
        run_context = install(pipe.unet, interval).run if interval > 1 else contextlib.nullcontext
        restore_offload = None if mode == "none" else functools.partial(offload, pipe, mode, device)
        if restore_offload:
            restore_offload()
        adapters = Adapters(pipe)
        return _Loaded(
            adapters=adapters,
            denoiser=Denoiser(pipe, family, decoder.output_type, run_context, lambda: adapters.text_lora_key),
            decoder=decoder,
            schedulers=Schedulers(pipe.scheduler, flow=family.flow),
            splitter=BatchSplitter(
                self._generate_part, functools.partial(find_device_failure, device), self._own_request
            ),
            compile_policy=CompilePolicy(
                Compiler(getattr(pipe, family.denoiser, None), device, adapters),
                self._options.compile if mode == "none" else "never",
                self._cache,
                f", feature cache {interval}" if interval > 1 else "",
            ),
            pipe=pipe,
            offload=restore_offload,
        )

    def _activate_loras(self, loaded: _Loaded, request: Request) -> bool:
        """Return True if the request's LoRAs could be activated.

        An error is only logged: generating the request meets it again and reports it.
        """
        try:
            with self._timed("load"):
                loaded.adapters.use(request)
        except Exception:
            logger.debug("not compiling: the LoRAs cannot be activated", exc_info=True)
            return False
        return True

    def _warmup_run(self, part: Sequence[Request]) -> None:
        """Run two steps of the part and discard the output."""
        loaded, parameters = self._require_loaded(), part[0].parameters
        step_count = min(2, parameters.num_inference_steps)
        shortened = [
            dataclasses.replace(
                request, parameters=dataclasses.replace(request.parameters, num_inference_steps=step_count)
            )
            for request in part
        ]
        with self._timed("compile"):
            scheduler = loaded.schedulers.get(parameters.scheduler)
            output = loaded.denoiser.denoise(
                shortened, scheduler, StepCounter(_ignore_step, len(part), step_count), len(part)
            )
            synchronize(output)

    def _generate_part(
        self, part: Sequence[Request], steps: StepCounter
    ) -> list[GeneratedImage | PromptFailed]:
        """Return the results of one call of the pipeline."""
        loaded = self._require_loaded()
        try:
            with _freed_hooks(loaded.pipe):
                with self._timed("load"), weights_on_host(loaded.pipe, loaded.offload):
                    loaded.adapters.use(part[0])
                return self._denoise_and_decode(loaded, part, steps)
        except PromptFailed as exc:  # raised for its LoRAs
            return [exc] * len(part)

    def _own_request(self) -> Request:
        """Return the engine's own request, with its chunks counted."""
        request = own_request(self._inspect_model().model_info)
        return dataclasses.replace(request, chunks=self._require_loaded().denoiser.chunks(request))

    def _denoise_and_decode(
        self, loaded: _Loaded, part: Sequence[Request], steps: StepCounter
    ) -> list[GeneratedImage | PromptFailed]:
        parameters = part[0].parameters
        scheduler = loaded.schedulers.get(parameters.scheduler)
        max_rows = loaded.splitter.max_size(part[0])
        with self._timed("denoise"), loaded.compile_policy.running(part, max_rows) as rows:
            output = loaded.denoiser.denoise(part, scheduler, steps, rows)
            synchronize(output)
        with self._timed("decode"):
            decoded = loaded.decoder.decode(output, (parameters.width, parameters.height))
        used = parameters.scheduler or self._inspect_model().model_info.scheduler
        return [
            result
            if isinstance(result, PromptFailed)
            else GeneratedImage(pixels=result, scheduler=used, truncated=loaded.denoiser.truncated(request))
            for request, result in zip(part, decoded, strict=True)
        ]

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - started


@contextlib.contextmanager
def _freed_hooks(pipe: Any) -> Iterator[None]:
    """Free what offloading holds on the device after the context, also after a failure.

    Otherwise the VAE, or after a failure any component, would stay there. An error of a broken device while
    it is freed must not replace what ended the context, such as a stop.
    """
    try:
        yield
    except BaseException:
        try:
            pipe.maybe_free_model_hooks()
        except Exception:
            logger.debug("the components cannot be moved off the device", exc_info=True)
        raise
    pipe.maybe_free_model_hooks()


def _ignore_step(_done: int, _total: int) -> None:
    """Ignore the steps of warm-up runs."""
