"""From a checked folder to a diffusers pipeline on the device, with nothing left to chance.

The libraries fill weights that a file lacks with random numbers, leave out those they do not know, and take
another dtype than was asked for, with a log line at the most. Each component is therefore loaded on its own
and its report read.
"""

from __future__ import annotations

import contextlib
import logging
import re
from typing import TYPE_CHECKING, Any, Final

from text2img.engine.devices import FailureKind, classify_error, one_line
from text2img.engine.inspection import check_size
from text2img.engine.model_folder import CHECKER, Component, Kind, ModelFolder
from text2img.errors import ConfigurationError, DeviceFailed, ModelFailed, Text2ImgError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from text2img.engine import EngineOptions, Offload


_BUFFERS: Final = re.compile(r"(^|\.)position_ids$")
"""Not weights but counted positions, which checkpoints from before 2023 still hold."""
_MISFIT: Final = re.compile("ignore_mismatched_sizes|Cannot copy out of meta tensor")
"""What the libraries say, to programmers, of a weight of another shape and of one that no file holds."""
_RENAMED: Final = {"CLIPFeatureExtractor": "CLIPImageProcessor"}
"""Classes that transformers 5 knows by another name; SD 1.4's index still has the old one."""


def load_pipeline(
    model: ModelFolder, variants: Mapping[str, str | None], device: str, dtype: Any, *, stay: bool = False
) -> Any:
    """The pipeline on ``device`` in ``dtype`` (a torch.dtype), complete and checked.

    With ``stay`` it is made ready for the device and stays in the host's memory.

    Raises ModelFailed for a model that does not load as it is written, or not into this device's memory;
    DeviceFailed when the device stops working.
    """
    try:
        place = "cpu" if stay else device
        parts = _components(model, variants, place, dtype)
        pipe = _assemble(model, parts, dtype)
        check_dtypes(pipe.components, dtype)
        check_tokenizers(pipe.components)
        pipe.to(place)
        _suit(pipe, device, dtype)
    except Text2ImgError:
        raise
    except Exception as exc:
        raise _failed(model, device, exc) from exc
    return pipe


def check_report(name: str, report: Mapping[str, Any]) -> None:
    """Raise ModelFailed where a component's loading report tells of missing, unknown or misshapen weights."""
    complaints = {
        "missing": list(report.get("missing_keys") or ()),
        "unknown": [key for key in report.get("unexpected_keys") or () if not _BUFFERS.search(key)],
        "misshapen": list(report.get("mismatched_keys") or ()),
        "unreadable": list(report.get("error_msgs") or ()),
    }
    for what, keys in complaints.items():
        if keys:
            first = min(map(str, keys))
            raise ModelFailed(
                f"the weights of the model's {name} are not those of its configuration: {len(keys)} {what},"
                f" such as {first}; fetch the model again"
            )


def check_dtypes(components: Mapping[str, Any], dtype: Any) -> None:
    """Raise ModelFailed where a component's weights are not in the dtype that was asked for.

    Layers that a class keeps in fp32 by its own declaration (T5's ``wo``) are as they should be.
    """
    import torch

    for name, module in components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for key, weight in module.named_parameters():
            kept = weight.dtype == torch.float32 and _keeps_fp32(module, key)
            if weight.is_floating_point() and weight.dtype != dtype and not kept:
                raise ModelFailed(f"the model's {name} was loaded in {weight.dtype} instead of {dtype}")


def check_tokenizers(components: Mapping[str, Any]) -> None:
    """Raise ModelFailed where a tokenizer, as loaded, does not fit its text encoder."""
    for name, tokenizer in components.items():
        encoder = components.get(name.replace("tokenizer", "text_encoder"))
        embedded = getattr(getattr(encoder, "config", None), "vocab_size", None)
        if name.startswith("tokenizer") and tokenizer is not None and isinstance(embedded, int):
            check_size(name, len(tokenizer), embedded, exact=type(tokenizer).__name__.startswith("CLIP"))


def _components(
    model: ModelFolder, variants: Mapping[str, str | None], device: str, dtype: Any
) -> dict[str, Any]:
    """Every component that holds weights, and those whose class has another name by now."""
    loaded: dict[str, Any] = {}
    for name, component in model.components.items():
        if component.kind is Kind.MODEL:
            loaded[name] = _weights(component, variants[name], device, dtype)
        elif component.class_name in _RENAMED:
            loaded[name] = _class_of(component).from_pretrained(component.folder)
    return loaded


def _weights(component: Component, variant: str | None, device: str, dtype: Any) -> Any:
    try:
        module, report = _class_of(component).from_pretrained(
            component.folder,
            dtype=dtype,
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            device_map={"": device},  # tensor by tensor: the host holds no copy of the whole
        )
    except (RuntimeError, ValueError) as exc:
        if not _MISFIT.search(str(exc)):
            raise
        raise ModelFailed(
            f"the weights of the model's {component.name} are not those of its configuration: some have"
            " another shape or are missing; fetch the model again"
        ) from exc
    check_report(component.name, report)
    return module.eval()


def _class_of(component: Component) -> Any:
    import diffusers
    import transformers

    class_name = _RENAMED.get(component.class_name, component.class_name)
    if component.library == "transformers":
        home: Any = transformers
    elif component.library == "diffusers":
        home = diffusers
    else:
        home = getattr(diffusers.pipelines, component.library)
    try:
        return getattr(home, class_name)
    except (AttributeError, ImportError) as exc:
        raise ModelFailed(
            f"the model's {component.name} is a {class_name}, which the installed {component.library} lacks:"
            " a newer version may have it"
        ) from exc


def _assemble(model: ModelFolder, parts: Mapping[str, Any], dtype: Any) -> Any:
    """The text-to-image pipeline of these parts; tokenizers and the scheduler it reads from the folder."""
    from diffusers import AutoPipelineForText2Image

    checker: dict[str, Any] = {name: None for name in CHECKER if name not in model.components}
    if "safety_checker" in checker:
        checker["requires_safety_checker"] = False
    if not _takes(model.pipeline, "safety_checker"):
        checker = {}
    pipe = AutoPipelineForText2Image.from_pretrained(
        model.path, dtype=dtype, use_safetensors=True, local_files_only=True, **{**checker, **parts}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _takes(pipeline: str, parameter: str) -> bool:
    import inspect

    import diffusers

    return parameter in inspect.signature(getattr(diffusers, pipeline).__init__).parameters


def _suit(pipe: Any, device: str, dtype: Any) -> None:
    """Arrange the weights for the device: convolutions there run faster on channels-last ones.

    torch rounds what goes into fp32 convolutions to TF32's 11 bits. Where fp32 was asked for, it is computed.
    With fp16 only a VAE that would overflow runs in fp32: for its range, and 11 bits are what fp16 has.
    """
    import torch

    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = dtype != torch.float32
        for name in ("unet", "vae"):
            if isinstance(getattr(pipe, name, None), torch.nn.Module):
                getattr(pipe, name).to(memory_format=torch.channels_last)


def _keeps_fp32(module: Any, key: str) -> bool:
    """Whether the class declares that the weight named ``key`` stays in fp32, by a part of its name."""
    kept: Iterable[str] = [
        *(getattr(module, "_keep_in_fp32_modules", None) or ()),
        *(getattr(module, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    return any(name in key.split(".") for name in kept)


def _failed(model: ModelFolder, device: str, exc: Exception) -> Text2ImgError:
    kind = classify_error(exc)
    if kind is FailureKind.MEMORY:
        return ModelFailed(f"{model.path} does not fit into {device}'s memory; use a smaller model or fp16")
    if kind is FailureKind.DEVICE:
        return DeviceFailed(f"{device} failed while the model was loaded: {one_line(exc)}")
    return ModelFailed(f"{model.path} cannot be loaded: {one_line(exc)}")


logger = logging.getLogger(__name__)


def check_offload(options: EngineOptions) -> None:
    """Raise ConfigurationError where the options ask for an offload that cannot be."""
    if options.offload == "none":
        return
    if options.device == "cpu":
        raise ConfigurationError(
            "--offload moves weights between a GPU and the host's memory, and on the cpu they are there"
            " anyway: leave out --offload, or use --device cuda"
        )
    if options.compile == "always":
        raise ConfigurationError(
            "--offload moves the weights that compiled code would hold: leave out --compile always or"
            " --offload"
        )


def choose_offload(options: EngineOptions, device: str) -> Offload:
    """What was asked for; ``none``, with a line in the log, where ``auto`` found no device but the cpu."""
    if device == "cpu" and options.offload != "none":
        logger.warning(
            "no GPU was found: the model is on the cpu, and --offload %s does nothing", options.offload
        )
        return "none"
    return options.offload


def offload(pipe: Any, how: Offload, device: str) -> None:
    """Let the weights of ``pipe``, now in the host's memory, go to ``device`` only while they are used.

    To be called after whatever replaces a part's ``forward``: what came later would bypass the hooks.
    """
    if how == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif how == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)


@contextlib.contextmanager
def weights_on_host(pipe: Any, again: Callable[[], None] | None) -> Iterator[None]:
    """Within it all weights are in the host's memory, as they are, for who changes the model's layers.

    ``again`` offloads the pipeline as before; None where it never was.
    """
    if again is None:
        yield
        return
    pipe.remove_all_hooks()
    try:
        yield
    finally:
        again()


def running_device(module: Any) -> Any:
    """The torch.device on which a module computes, which is not where its weights wait to be used."""
    import torch

    hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in devices if device is not None), module.device)
    return torch.device(found)
