"""From a model's name to a diffusers pipeline on the device: find the folder, load it, offload its weights.

From the hub only the files that will be read are fetched: configurations, vocabularies, and one set of
safetensors per component. With no more than a log line, the libraries fill weights that a file lacks with
random numbers, drop unknown weights, and use another dtype than requested. Each component is therefore loaded
on its own and its report checked.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from text2img.engine.devices import (
    TORCHAO,
    FailureKind,
    classify_error,
    one_line,
    quantization_method,
    silence_hub,
)
from text2img.engine.inspection import check_size
from text2img.engine.model_folder import (
    CHECKER,
    RENAMED,
    Component,
    Kind,
    ModelFolder,
    choose_variant,
    class_of,
    components_in,
    kind_of,
    read_json,
    stem_of,
)
from text2img.engine.single_file import is_single_file, load_single_file
from text2img.errors import ConfigurationError, DeviceFailed, ModelFailed, Text2ImgError
from text2img.settings import check_hub_cache, expand_home

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from text2img.engine import EngineOptions, Offload


_HUB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TEXT_SUFFIXES: Final = (".json", ".txt", ".model")
TIMEOUT: Final = 10.0
"""Seconds for the hub to answer one request; a run makes up to three before it fails, 30 s in all."""


def find(options: EngineOptions, timeout: float = TIMEOUT) -> tuple[Path, str | None]:
    """Return the model's folder or file and, if it comes from the hub, its commit; ``timeout`` in seconds.

    Raises ConfigurationError for a name that can never be read, ModelFailed for a model that does not exist.
    """
    if is_single_file(options.model):
        return _find_file(options, timeout)
    select_files = partial(wanted_files, options=options)
    return _resolve(
        _ModelSource(options.model, options.revision, "model", "model_index.json", select_files, timeout)
    )


def _find_file(options: EngineOptions, timeout: float) -> tuple[Path, str | None]:
    """Return a single file on this machine, or from the hub: ``owner/name/file.safetensors``."""
    name = options.model
    file = expand_home(name, "--model-id (or model_path)")
    if file.is_file():
        return file.resolve(), None
    hub_id, path = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    if "://" not in name and (not _HUB_ID.fullmatch(hub_id) or not path or ".." in path.split("/")):
        raise ConfigurationError(f"no file at {name}; one on the hub is named owner/model/file.safetensors")
    source = _ModelSource(
        name if "://" in name else hub_id, options.revision, "model", path, lambda *_: [path], timeout
    )
    folder, commit = _resolve(source)
    return folder / path, commit


def find_here(options: EngineOptions) -> tuple[Path, str | None] | None:
    """Return the model's folder as ``find`` does, if this machine has it; None if it would be fetched."""
    if "://" in options.model:
        return None
    folder = expand_home(options.model, "--model-id (or model_path)")
    if is_single_file(options.model):
        return (folder.resolve(), None) if folder.is_file() else None
    if folder.is_dir():
        return folder.resolve(), None
    if options.model.startswith((".", "~")) or not _HUB_ID.fullmatch(options.model):
        return None
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(options.model, "model_index.json", revision=options.revision)
    return (Path(index).parent, Path(index).parent.name) if isinstance(index, str) else None


def find_autoencoder(name: str) -> tuple[Path, str | None]:
    """Return an autoencoder's folder and, if it comes from the hub, its commit, as ``find`` does.

    A hub id may have a revision: ``owner/name@revision``.
    """
    is_folder = expand_home(name, "--autoencoder (AUTOENCODER)").is_dir()
    hub_id, _, revision = (name, "", "") if is_folder else name.partition("@")
    return _resolve(
        _ModelSource(
            hub_id, revision or None, "autoencoder", "config.json", _select_single_component, TIMEOUT
        )
    )


@dataclass(frozen=True, slots=True)
class _ModelSource:
    """A name to resolve, and how to select the files to fetch.

    ``kind`` is the word for it in messages; ``index`` is the file that every repository of the kind has.
    ``select_files`` selects the files that a load will read, from a repository's file names and the index's
    content. ``timeout``: seconds for the hub to answer one request.
    """

    name: str
    revision: str | None
    kind: str
    index: str
    select_files: Callable[[Sequence[str], Mapping[str, object]], list[str]]
    timeout: float


def _resolve(source: _ModelSource) -> tuple[Path, str | None]:
    name, kind = source.name, source.kind
    if "://" in name:
        raise ConfigurationError(
            f"{kind}s at {name.split('://')[0]}:// cannot be read; copy the {kind} into a folder"
        )
    folder = expand_home(name, "--model-id (or model_path)")
    if folder.is_dir():
        return folder.resolve(), None
    if folder.is_file():
        raise ModelFailed(f"{name} is a file; use a folder in diffusers' format")
    if name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelFailed(f"no {kind} folder at {name}; use a folder, or a hub id such as owner/{kind}")
    return _fetch_from_hub(source)


def wanted_files(files: Sequence[str], index: Mapping[str, object], options: EngineOptions) -> list[str]:
    """Return a repository's files that a load will read. Raises ModelFailed where weights are missing."""
    selected = ["model_index.json"]
    for name, (library, class_name) in components_in(index).items():
        if name in CHECKER and not options.safety_checker:
            continue
        component_files = [file for file in files if str(PurePosixPath(file).parent) == name]
        selected += [file for file in component_files if file.endswith(_TEXT_SUFFIXES)]
        if kind_of(str(class_name)) is Kind.MODEL and name not in options.without:
            names = [PurePosixPath(file).name for file in component_files]
            stem = stem_of(str(library))
            variant = choose_variant(names, stem, options.variant, f"{options.model}/{name}")
            selected += [f"{name}/{file}" for file in names if _is_weight_file(file, stem, variant)]
    return selected


def _is_weight_file(file: str, stem: str, variant: str | None) -> bool:
    dot = re.escape(f".{variant}") if variant else ""
    return bool(re.fullmatch(rf"{re.escape(stem)}{dot}(-\d+-of-\d+)?\.safetensors", file))


def _select_single_component(files: Sequence[str], _: Mapping[str, object]) -> list[str]:
    """Select the files of a repository that is one component: configuration and one set of weights."""
    component_files = [file for file in files if "/" not in file]
    stem = stem_of("diffusers")
    variant = choose_variant(component_files, stem, None, "the autoencoder")
    return ["config.json", *(file for file in component_files if _is_weight_file(file, stem, variant))]


def _fetch_from_hub(source: _ModelSource) -> tuple[Path, str | None]:
    """Return a snapshot with the needed files, or an earlier run's copy if the hub is unreachable."""
    check_hub_cache()
    # The hub's client reads these when it is imported; values that the user has set are kept.
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(int(TIMEOUT)))
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(int(TIMEOUT)))
    silence_hub()
    from huggingface_hub import errors, is_offline_mode

    if is_offline_mode():
        return _find_cached(source, "HF_HUB_OFFLINE is set")
    try:
        return _snapshot(source)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as exc:
        raise ModelFailed(_describe_refusal(source, exc)) from exc
    except (ModelFailed, ConfigurationError):
        raise
    except Exception as exc:  # noqa: BLE001 - httpx's, urllib's and the hub's own errors share no other base
        return _find_cached(source, f"the hub cannot be reached ({type(exc).__name__})")


def _snapshot(source: _ModelSource) -> tuple[Path, str]:
    """Fetch one commit's files; files in the cache are not fetched again."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    info = HfApi().model_info(source.name, revision=source.revision, timeout=source.timeout)
    commit = str(info.sha)
    files = [str(sibling.rfilename) for sibling in info.siblings or ()]
    if source.index not in files:
        if not source.index.endswith(".json"):
            raise ConfigurationError(f"{source.name} has no file {source.index} on the hub; check its name")
        raise ModelFailed(f"{source.name} is not in diffusers' format: it has no {source.index}")
    # By name, not by commit: the cache then knows the name's commit, which an offline run needs.
    index = hf_hub_download(source.name, source.index, revision=source.revision, etag_timeout=source.timeout)
    content = read_json(Path(index)) if source.index.endswith(".json") else {}
    selected = source.select_files(files, content)
    path = snapshot_download(
        source.name, revision=commit, allow_patterns=selected, etag_timeout=source.timeout
    )
    return Path(path), commit


def _find_cached(source: _ModelSource, reason: str) -> tuple[Path, str | None]:
    """Return the copy that an earlier run fetched; the inspection checks that it is complete."""
    from huggingface_hub import hf_hub_download

    try:
        index = hf_hub_download(source.name, source.index, revision=source.revision, local_files_only=True)
    except Exception as exc:
        raise ModelFailed(
            f"{reason} and this machine has no copy of {source.name}: check the network and the name, or use"
            " a model folder"
        ) from exc
    path = Path(index).parents[source.index.count("/")]
    return path, path.name


def _describe_refusal(source: _ModelSource, exc: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(exc, errors.GatedRepoError):
        return f"{source.name} is gated: accept its terms on the hub and set HF_TOKEN to your token"
    if isinstance(exc, errors.RevisionNotFoundError):
        return f"{source.name} has no revision {source.revision} on the hub"
    return f"{source.name} is not on the hub, or is private: check the name, or set HF_TOKEN to your token"


_BUFFERS: Final = re.compile(r"(^|\.)position_ids$")
"""Buffers of positions, not weights; checkpoints from before 2023 still contain them."""
_MISMATCH: Final = re.compile("ignore_mismatched_sizes|Cannot copy out of meta tensor")
"""The libraries' messages for a weight of another shape and for one that no file contains."""


def load_pipeline(
    model: ModelFolder, variants: Mapping[str, str | None], device: str, dtype: Any, *, on_host: bool = False
) -> Any:
    """Return the pipeline on ``device`` in ``dtype`` (a torch.dtype), complete and checked.

    With ``on_host`` it is prepared for the device and stays in the host's memory.

    Raises ModelFailed for a model that does not load as its configuration declares, or does not fit into this
    device's memory; DeviceFailed when the device stops working.
    """
    try:
        target = "cpu" if on_host else device
        components = _load_components(model, variants, target, dtype)
        pipe = _assemble(model, components, dtype)
        check_dtypes(pipe.components, dtype)
        check_tokenizers(pipe.components)
        pipe.to(target)
        _optimise(pipe, device, dtype)
    except Text2ImgError:
        raise
    except Exception as exc:
        raise _load_error(model, device, exc) from exc
    return pipe


def check_report(name: str, report: Mapping[str, Any]) -> None:
    """Raise ModelFailed if a component's loading report lists missing, unknown or misshapen weights."""
    problems = {
        "missing": list(report.get("missing_keys") or ()),
        "unknown": [key for key in report.get("unexpected_keys") or () if not _BUFFERS.search(key)],
        "misshapen": list(report.get("mismatched_keys") or ()),
        "unreadable": list(report.get("error_msgs") or ()),
    }
    for problem, keys in problems.items():
        if keys:
            first = min(map(str, keys))
            raise ModelFailed(
                f"the weights of the model's {name} do not match its configuration: {len(keys)} {problem},"
                f" such as {first}; fetch the model again"
            )


def check_dtypes(components: Mapping[str, Any], dtype: Any) -> None:
    """Raise ModelFailed if a component's weights are not in the requested dtype.

    Layers that a class declares to keep in fp32 (T5's ``wo``) are accepted.
    """
    import torch

    for name, module in components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for key, weight in module.named_parameters():
            declared_fp32 = weight.dtype == torch.float32 and _keeps_fp32(module, key)
            if weight.is_floating_point() and weight.dtype != dtype and not declared_fp32:
                raise ModelFailed(f"the model's {name} was loaded in {weight.dtype} instead of {dtype}")


def check_tokenizers(components: Mapping[str, Any]) -> None:
    """Raise ModelFailed if a tokenizer, as loaded, does not fit its text encoder."""
    for name, tokenizer in components.items():
        encoder = components.get(name.replace("tokenizer", "text_encoder"))
        embedded = getattr(getattr(encoder, "config", None), "vocab_size", None)
        if name.startswith("tokenizer") and tokenizer is not None and isinstance(embedded, int):
            own = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor of texts and images
            check_size(name, len(own), embedded, exact=type(own).__name__.startswith("CLIP"))


def _load_components(
    model: ModelFolder, variants: Mapping[str, str | None], device: str, dtype: Any
) -> dict[str, Any]:
    """Load every component that has weights, and those whose class was renamed."""
    loaded: dict[str, Any] = {}
    for name, component in model.components.items():
        if component.kind is Kind.MODEL:
            loaded[name] = _load_component(component, variants.get(name), device, dtype)
        elif component.kind is Kind.SCHEDULER and component.file is not None:
            loaded[name] = class_of(component).from_config(dict(component.config))
        elif component.class_name in RENAMED:
            loaded[name] = class_of(component).from_pretrained(component.folder, trust_remote_code=False)
    return loaded


def _load_component(component: Component, variant: str | None, device: str, dtype: Any) -> Any:
    # A device map loads tensor by tensor, without a full copy in the host's memory. diffusers takes one that
    # names the CPU for an offload, which torchao's weights do not have.
    on_cpu = device == "cpu" and quantization_method(component) == TORCHAO
    try:
        if component.file is not None:
            module, report = load_single_file(component, class_of(component), device, dtype)
        else:
            module, report = class_of(component).from_pretrained(
                component.folder,
                dtype=dtype,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                device_map=None if on_cpu else {"": device},
                trust_remote_code=False,
            )
    except (RuntimeError, ValueError) as exc:
        if not _MISMATCH.search(str(exc)):
            raise
        raise ModelFailed(
            f"the weights of the model's {component.name} do not match its configuration: some have another"
            " shape or are missing; fetch the model again"
        ) from exc
    check_report(component.name, report)
    return module.eval()


def _assemble(model: ModelFolder, components: Mapping[str, Any], dtype: Any) -> Any:
    """Create the text-to-image pipeline from these parts.

    It reads tokenizers and scheduler from the folder.
    """
    import diffusers

    empty = {name: None for name in model.empty if _accepts(model.pipeline, name)}
    checker: dict[str, Any] = {name: None for name in CHECKER if name not in model.components}
    if "safety_checker" in checker:
        checker["requires_safety_checker"] = False
    if not _accepts(model.pipeline, "safety_checker"):
        checker = {}
    # Where invisible-watermark is installed, SDXL would change the pixels by itself.
    marker = {"add_watermarker": False} if _accepts(model.pipeline, "add_watermarker") else {}
    pipe = getattr(diffusers, model.pipeline).from_pretrained(
        model.path,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        **{**empty, **checker, **marker, **components},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _accepts(pipeline: str, parameter: str) -> bool:
    import inspect

    import diffusers

    return parameter in inspect.signature(getattr(diffusers, pipeline).__init__).parameters


def _optimise(pipe: Any, device: str, dtype: Any) -> None:
    """Arrange the weights for the device: convolutions on CUDA are faster with channels-last weights.

    torch rounds the inputs of fp32 convolutions to TF32's 11 bits. Where fp32 was requested, that is
    disabled. With fp16 only a VAE that would overflow runs in fp32. It needs the range, and fp16 has 11 bits
    as well.
    """
    import torch

    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = dtype != torch.float32
        for name in ("unet", "vae"):
            if isinstance(getattr(pipe, name, None), torch.nn.Module):
                getattr(pipe, name).to(memory_format=torch.channels_last)


def _keeps_fp32(module: Any, key: str) -> bool:
    """Return True if the class declares, by a part of the name, that the weight ``key`` stays in fp32."""
    fp32_names: Iterable[str] = [
        *(getattr(module, "_keep_in_fp32_modules", None) or ()),
        *(getattr(module, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    return any(name in key.split(".") for name in fp32_names)


def _load_error(model: ModelFolder, device: str, exc: Exception) -> Text2ImgError:
    kind = classify_error(exc)
    if kind is FailureKind.MEMORY:
        return ModelFailed(f"{model.path} does not fit into {device}'s memory; use a smaller model or fp16")
    if kind in (FailureKind.DEVICE, FailureKind.UNCLEAR):
        return DeviceFailed(f"{device} failed while the model was loaded: {one_line(exc)}")
    return ModelFailed(f"{model.path} cannot be loaded: {one_line(exc)}")


logger = logging.getLogger(__name__)


def check_offload(options: EngineOptions) -> None:
    """Raise ConfigurationError if the options request an impossible offload."""
    if options.offload == "none":
        return
    if options.device == "cpu":
        raise ConfigurationError(
            "--offload moves weights between a GPU and the host's memory and has no effect on the cpu: leave"
            " out --offload, or use --device cuda"
        )
    if options.compile == "always":
        raise ConfigurationError(
            "compiled code holds the weights that --offload moves: leave out --compile always or --offload"
        )


def choose_offload(options: EngineOptions, device: str) -> Offload:
    """Return the requested offload, or ``none`` with a log line where ``auto`` found only the CPU."""
    if device == "cpu" and options.offload != "none":
        logger.warning(
            "no GPU was found: the model runs on the cpu and --offload %s has no effect", options.offload
        )
        return "none"
    return options.offload


def offload(pipe: Any, mode: Offload, device: str) -> None:
    """Keep the weights of ``pipe`` in the host's memory and move them to ``device`` only while they are used.

    Call it after anything that replaces a component's ``forward``; later replacements would bypass the hooks.
    """
    if mode == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif mode == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)


@contextlib.contextmanager
def weights_on_host(pipe: Any, restore_offload: Callable[[], None] | None) -> Iterator[None]:
    """Hold all weights in the host's memory within the context, so that the model's layers can be changed.

    ``restore_offload`` offloads the pipeline again; None where it was not offloaded.
    """
    if restore_offload is None:
        yield
        return
    pipe.remove_all_hooks()
    try:
        yield
    finally:
        restore_offload()


def running_device(module: Any) -> Any:
    """Return the torch.device on which a module computes; its weights may wait on another."""
    import torch

    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in devices if device is not None), module.device)
    return torch.device(found)
