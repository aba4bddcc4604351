"""Quantised weights: which library loads them, and whether it is there.

``quantization_config`` in a component's configuration names the method. A library that is missing, or that
does not work here, is found before any prompt is claimed. This module imports the library only if a model
needs it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from text2img.engine.devices import choose_device, one_line, suppress_warnings
from text2img.engine.model_folder import Kind
from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from text2img.engine import Device
    from text2img.engine.model_folder import Component, ModelFolder


TORCHAO: Final = "torchao"
_LIBRARIES: Final = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    TORCHAO: ("torchao", "torchao"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "gguf": ("gguf", "gguf"),
}
"""Methods, with the module that loads their weights and the package that has it."""
_NEEDS_CUDA: Final = ("bitsandbytes",)


def check_quantized(model: ModelFolder, device: Device) -> None:
    """Raise ConfigurationError if quantised weights of the model cannot be loaded on this device."""
    for component in model.components.values():
        method = quantization_method(component)
        if method is None:
            continue
        what = f"the model's {component.name} is quantised by {method}"
        if method not in _LIBRARIES or method == "gguf":
            raise ConfigurationError(
                f"{what}, which text2img does not load; use a model that is not quantised, or by torchao,"
                " quanto or bitsandbytes"
            )
        require(method, what)
        if method in _NEEDS_CUDA and choose_device(device) != "cuda":
            raise ConfigurationError(
                f"{what}, which needs a CUDA device, and this run's is {choose_device(device)}; use a model"
                " that is not quantised by it"
            )


def quantization_method(component: Component) -> str | None:
    """Return the method by which the component's weights are quantised, None if they are not.

    Older models by bitsandbytes name no method. Weights from a single file are not the folder's.
    """
    config: Mapping[str, Any] | None = component.config.get("quantization_config")
    if component.kind is not Kind.MODEL or component.file is not None or not isinstance(config, dict):
        return None
    if "quant_method" not in config:
        return "bitsandbytes" if config.get("load_in_4bit") or config.get("load_in_8bit") else "unknown means"
    method = str(config["quant_method"])
    return "bitsandbytes" if method.startswith("bitsandbytes") else method


def require(method: str, what: str) -> None:
    """Raise ConfigurationError if the method's library cannot be imported; ``what`` begins the message."""
    module, package = _LIBRARIES[method]
    try:
        with suppress_warnings():
            importlib.import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name and module.startswith(exc.name):
            raise ConfigurationError(
                f"{what}, and {package} is not installed; install it: pip install {package}"
            ) from exc
        raise ConfigurationError(_broken(what, package, exc)) from exc
    except Exception as exc:
        raise ConfigurationError(_broken(what, package, exc)) from exc


def _broken(what: str, package: str, exc: Exception) -> str:
    return f"{what}, and {package} cannot be imported: {one_line(exc)}; install a version that fits"
