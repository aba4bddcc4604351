"""Devices: detection, dtypes, memory, classification of errors, and silencing of the libraries.

``check_device`` needs no torch; the other functions import it when they are called.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import platform
import sys
import threading
import warnings
from enum import Enum, auto
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import DeviceFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from text2img.engine import EngineOptions


_NO_GPU: Final = (
    "device cuda was requested, but there is no GPU: start the container with --gpus all, or use --device cpu"
)
_NO_MPS: Final = "device mps was requested, but it exists on Apple silicon only: use --device auto"
_MEMORY_SIGNS: Final = ("out of memory", "can't allocate memory", "cannot allocate memory", "ALLOC_FAILED")
_DEVICE_SIGNS: Final = ("CUDA error", "device-side assert", "HIP error", "CUDA driver error")


class FailureKind(Enum):
    """The kind of failure that an exception from the libraries reports."""

    MEMORY = auto()  # out of memory; a smaller batch may fit
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


def choose_dtype(options: EngineOptions, device: str) -> Any:
    """Return the torch.dtype to compute in, never a string: diffusers reads an unknown string as fp32."""
    import torch

    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if options.dtype == "auto":
        return torch.float32 if device == "cpu" else torch.float16
    return dtypes[options.dtype]


def classify_error(exc: BaseException) -> FailureKind:
    """Return the kind of failure. Messages count too: some allocators do not raise torch.OutOfMemoryError."""
    import torch

    message = str(exc)
    if isinstance(exc, torch.OutOfMemoryError | MemoryError):
        return FailureKind.MEMORY
    if not isinstance(exc, RuntimeError):
        return FailureKind.OTHER
    if any(sign in message for sign in _MEMORY_SIGNS):
        return FailureKind.MEMORY
    accelerator = isinstance(exc, getattr(torch, "AcceleratorError", ()))
    if accelerator or any(sign in message for sign in _DEVICE_SIGNS):
        return FailureKind.DEVICE
    return FailureKind.OTHER


def one_line(exc: BaseException) -> str:
    """Return the exception's class and message on one line, the message cut at 300 characters."""
    message = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {message[:300]}" if message else type(exc).__name__


def free_caches() -> None:
    """Free the memory that the allocators cache."""
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
    if output.device.type == "cuda":
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
