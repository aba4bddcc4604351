"""Devices: detection, dtypes, memory, classification of errors, and silencing of the libraries.

``check_device`` needs no torch; the other functions import it when they are called.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import importlib
import logging
import os
import platform
import sys
import threading
import warnings
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from text2img.engine.model_folder import Kind
from text2img.errors import ConfigurationError, DeviceFailed, ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from text2img.engine import Device, EngineOptions
    from text2img.engine.model_folder import Component, ModelFolder


logger = logging.getLogger(__name__)

_NO_GPU: Final = (
    "device cuda was requested, but there is no GPU: start the container with --gpus all, or use --device cpu"
)
_NO_MPS: Final = "device mps was requested, but it exists on Apple silicon only: use --device auto"
_MEMORY_SIGNS: Final = (
    "out of memory",
    "out_of_memory",
    "outofmemory",
    "not enough memory",
    "insufficient memory",
    "can't allocate memory",
    "cannot allocate memory",
    "alloc_failed",
    "allocation_failed",
    "invalid buffer size",  # Metal's, for a buffer larger than its memory
    "nvml_success == r",  # the allocator's report fails where NVML is restricted: in MIG slices, containers
)
_UNCLEAR_SIGNS: Final = (
    "unable to find an engine",  # cuDNN found no algorithm, often because none had the memory it needs
    "unable to find a valid cudnn algorithm",
    "no valid engine config",
    "no execution plans",
    "status_not_initialized",  # a library's handle needs memory
    "status_internal_error",
)
_LAUNCH_SIGNS: Final = (
    "invalid argument",
    "invalid configuration argument",
    "too many resources requested",
    "status_invalid_value",
    "status_not_supported",
    "status_bad_param",
)
"""One call's arguments were refused: later calls may succeed, so that it may be due to the prompt."""
_DEVICE_SIGNS: Final = (
    "cuda error",
    "cuda driver error",
    "hip error",
    "triton error",
    "device-side assert",
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
    "status_execution_failed",
    "status_mapping_error",
    "uncorrectable ecc",
)
_TIGHT_BYTES: Final = 2**30
_TIGHT_SHARE: Final = 0.1
"""Memory is short when less than this share of the device's is available, or less than _TIGHT_BYTES."""


class FailureKind(Enum):
    """The kind of failure that an exception from the libraries reports."""

    MEMORY = auto()  # out of memory; a smaller batch may fit
    UNCLEAR = auto()  # out of memory or the device's failure: a smaller batch may fit
    DEVICE = auto()  # the device has stopped working for the rest of the process
    OTHER = auto()  # anything else, presumably caused by the prompt


def check_device(device: str) -> None:
    """Raise DeviceFailed if the requested device cannot exist; takes milliseconds and needs no torch.

    ``auto`` and ``cpu`` always exist. A GPU that is detected here may still not work with the installed
    torch: ``choose_device`` checks that.
    """
    if device == "cuda" and not _gpu_exists():
        raise DeviceFailed(_NO_GPU)
    if device == "mps" and (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        raise DeviceFailed(_NO_MPS)


def choose_device(device: str) -> str:
    """Return ``cuda``, ``mps`` or ``cpu``: the requested one, or with ``auto`` the fastest that is usable."""
    import torch

    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, available in usable.items() if available)
    if not usable[device]:
        raise DeviceFailed(
            f"device {device} was requested, but this PyTorch ({torch.__version__}) cannot use it: install a"
            f" build of PyTorch for it, or use --device cpu"
        )
    return device


def choose_dtype(options: EngineOptions, device: str, *, stored_bf16: bool = False) -> Any:
    """Return the torch.dtype to compute in, never a string: diffusers reads an unknown string as fp32.

    ``stored_bf16``: the model is a transformer whose weights are in bf16. Raises ConfigurationError for a
    requested bf16 that the device does not have.
    """
    import torch

    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if options.dtype == "auto":
        if device == "cpu":
            return torch.float32
        return torch.bfloat16 if stored_bf16 and _has_bf16(device) else torch.float16
    if options.dtype == "bf16" and not _has_bf16(device):
        raise ConfigurationError(
            f"--dtype bf16 (DTYPE): this {device} device does not compute in bf16; use fp16, fp32 or auto"
        )
    return dtypes[options.dtype]


def check_dtype(options: EngineOptions) -> None:
    """Raise ConfigurationError for a requested bf16 that the device does not have; imports torch for that."""
    if options.dtype == "bf16" and options.device != "cpu" and (options.device == "mps" or _gpu_exists()):
        choose_dtype(options, choose_device(options.device))


def _has_bf16(device: str) -> bool:
    """Return True if the device computes in bf16 itself; emulation is slower than fp32."""
    import torch

    if device == "cuda" and torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device != "mps" or bool(torch.backends.mps.is_macos_or_newer(14, 0))


def classify_error(exc: BaseException) -> FailureKind:
    """Return the kind of failure. Messages count too: some allocators do not raise torch.OutOfMemoryError.

    An exception without a sign of the device is of its cause's kind.
    """
    kind = _classify_alone(exc)
    if kind is FailureKind.OTHER and exc.__cause__ is not None:
        return classify_error(exc.__cause__)
    if kind is FailureKind.UNCLEAR and _memory_is_short():
        return FailureKind.MEMORY
    return kind


def _classify_alone(exc: BaseException) -> FailureKind:
    import torch

    if isinstance(exc, torch.OutOfMemoryError | MemoryError):
        return FailureKind.MEMORY
    if isinstance(exc, OSError) and exc.errno == errno.ENOMEM:
        return FailureKind.MEMORY
    if not isinstance(exc, RuntimeError):
        return FailureKind.OTHER
    message = str(exc).casefold()
    accelerator = isinstance(exc, getattr(torch, "AcceleratorError", ()))
    for signs, kind in (
        (_MEMORY_SIGNS, FailureKind.MEMORY),
        (_UNCLEAR_SIGNS, FailureKind.UNCLEAR),
        (_LAUNCH_SIGNS, FailureKind.OTHER),
        (_DEVICE_SIGNS, FailureKind.DEVICE),
    ):
        if any(sign in message for sign in signs):
            return kind
    return FailureKind.DEVICE if accelerator else FailureKind.OTHER


def _memory_is_short() -> bool:
    """Return True if little of the device's memory is available; False where that is unknown."""
    import torch

    try:
        if not torch.cuda.is_available():
            return False
        free, total = torch.cuda.mem_get_info()
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    except Exception:  # noqa: BLE001 - a device that has failed raises here as well
        return False
    return bool(free + cached < max(_TIGHT_BYTES, _TIGHT_SHARE * total))


def find_device_failure(device: str) -> str | None:
    """Free the cached memory and run a tiny kernel; return what fails, or None if the device works.

    A device without memory works: it fails only those who need more than it has.
    """
    try:
        _empty_caches()
    except Exception as exc:  # noqa: BLE001 - whatever it is, it is what the device answers
        if classify_error(exc) is FailureKind.DEVICE:
            return one_line(exc)
    try:
        _run_kernel(device)
    except Exception as exc:  # noqa: BLE001 - as above
        return None if classify_error(exc) is FailureKind.MEMORY else one_line(exc)
    return None


def out_of_memory(width: int, height: int) -> PromptFailed:
    """Return the failure of a request for which the device has too little memory."""
    return PromptFailed(
        ErrorCode.OUT_OF_MEMORY, f"a single image of {width}×{height} does not fit into the device's memory"
    )


def _run_kernel(device: str) -> None:
    """Multiply two tiny matrices on the device, and wait for the result."""
    import torch

    ones = torch.ones(4, 4, device=device)
    if (ones @ ones).sum().item() != 64:  # 16 sums of four ones
        raise RuntimeError("the device computes wrong values")


def one_line(exc: BaseException) -> str:
    """Return the exception's class and message on one line, the message cut at 300 characters."""
    message = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {message[:300]}" if message else type(exc).__name__


def free_caches() -> None:
    """Free the memory that the allocators cache. A device that has failed cannot; that is only logged."""
    try:
        _empty_caches()
    except Exception:
        logger.debug("the device's cached memory cannot be freed", exc_info=True)


@contextlib.contextmanager
def frozen_heap() -> Iterator[None]:
    """Import and load without garbage collections, and exclude what was made from all later ones.

    The libraries are some million objects that live as long as the process. Collections that search them
    took 1.7 s of processor time while they were imported, and 0.4 s each time that memory is freed.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def _empty_caches() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def peak_memory() -> int:
    """Return the peak memory in bytes: on CUDA that of tensors, elsewhere the process's resident set.

    Apple's allocator counts no peak, so the process's is returned there as well.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize(output: Any) -> None:
    """Wait until the device has finished. Calls return long before, and the time must be measured here."""
    if getattr(getattr(output, "device", None), "type", None) == "cuda":
        import torch

        torch.cuda.synchronize()


def _gpu_exists() -> bool:
    """Return True if NVIDIA's driver counts a device (cuInit, cuDeviceGetCount) or ROCm's node exists."""
    if Path("/dev/kfd").exists():
        return True
    count = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return False


def silence_libraries() -> None:
    """Silence transformers, diffusers and the hub's client, importing them in the order this requires.

    diffusers makes transformers warn while it is imported, so transformers is silenced first.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns whenever a process forks
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    silence_hub()


def silence_hub() -> None:
    """Silence the hub's client alone, which needs no torch."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    with suppress_warnings():  # it warns when an environment variable enables the bars
        disable_progress_bars()
    for name in ("huggingface_hub", "httpx", "httpx2"):  # the HTTP client logs every request
        logging.getLogger(name).setLevel(logging.ERROR)


class _WarningFilter:
    """Ignores Python's warnings while any thread is inside; the filters belong to the process.

    If each thread saved and restored them for itself, one could leave another's behind.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._saved = warnings.catch_warnings()

    def enter(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.simplefilter("ignore")

    def exit(self) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._saved.__exit__(None, None, None)


_warning_filter = _WarningFilter()


@contextlib.contextmanager
def suppress_warnings() -> Iterator[None]:
    """Ignore Python warnings within the context; reentrant and usable from any thread."""
    _warning_filter.enter()
    try:
        yield
    finally:
        _warning_filter.exit()


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
