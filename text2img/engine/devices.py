"""Devices: which there are, what they hold, and what an exception says about them.

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
    "device cuda was asked for, but there is no GPU: start the container with --gpus all, or use --device cpu"
)
_NO_MPS: Final = "device mps was asked for, but it exists on Apple silicon only: use --device auto"
_MEMORY_SIGNS: Final = ("out of memory", "can't allocate memory", "cannot allocate memory", "ALLOC_FAILED")
_DEVICE_SIGNS: Final = ("CUDA error", "device-side assert", "HIP error", "CUDA driver error")


class FailureKind(Enum):
    """What an exception from the libraries is about."""

    MEMORY = auto()  # too much at once; less may fit
    DEVICE = auto()  # the device has stopped working; nothing will run on it any more
    OTHER = auto()  # anything else: presumably the prompt


def check_device(device: str) -> None:
    """Raise DeviceFailed where the device that was asked for cannot be there; takes milliseconds, no torch.

    ``auto`` and ``cpu`` are always there. A GPU that is seen here may still fail to work with the torch
    that is installed: ``choose_device`` finds that out.
    """
    if device == "cuda" and not _gpu_is_there():
        raise DeviceFailed(_NO_GPU)
    if device == "mps" and (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        raise DeviceFailed(_NO_MPS)


def choose_device(device: str) -> str:
    """``cuda``, ``mps`` or ``cpu``: what was asked for, or with ``auto`` the fastest that torch can use."""
    import torch

    usable = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, there in usable.items() if there)
    if not usable[device]:
        raise DeviceFailed(
            f"device {device} was asked for, but this PyTorch ({torch.__version__}) cannot use it: install a"
            f" build of PyTorch for it, or use --device cpu"
        )
    return device


def choose_dtype(options: EngineOptions, device: str) -> Any:
    """The torch.dtype to compute in. It is never a string: diffusers reads an unknown string as fp32."""
    import torch

    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    if options.dtype == "auto":
        return torch.float32 if device == "cpu" else torch.float16
    return dtypes[options.dtype]


def classify_error(exc: BaseException) -> FailureKind:
    """What the exception is about. Not every allocator raises torch.OutOfMemoryError: messages count too."""
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
    """The exception's kind and message on one line, not endless."""
    message = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {message[:300]}" if message else type(exc).__name__


def free_caches() -> None:
    """Give back what the allocators keep for later."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def peak_memory() -> int:
    """The most bytes held so far: on CUDA those of tensors, elsewhere the process's resident set.

    Apple's allocator counts no peak, so that the process's is told there as well.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def wait_for(output: Any) -> None:
    """Until the device has finished: it is told what to do long before, and the clock must not stop then."""
    if output.device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def _gpu_is_there() -> bool:
    """Whether NVIDIA's driver counts a device (cuInit, cuDeviceGetCount) or ROCm's node exists."""
    if Path("/dev/kfd").exists():
        return True
    count = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        driver = ctypes.CDLL("libcuda.so.1")
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return False


def silence_libraries() -> None:
    """Import the libraries in the order that lets them be silenced before they speak.

    diffusers makes transformers warn while it is imported, so transformers is silenced first.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns wherever a process forks
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

    with suppress_warnings():  # it warns when an environment variable wants the bars
        disable_progress_bars()
    for name in ("huggingface_hub", "httpx", "httpx2"):  # the HTTP client logs every request
        logging.getLogger(name).setLevel(logging.ERROR)


class _WarningFilter:
    """Python's warnings ignored while anybody is within; the filters are the process's, not a thread's.

    Each thread saving and restoring them for itself could leave those of another one behind.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._saved = warnings.catch_warnings()

    def enter(self) -> None:
        with self._lock:
            self._within += 1
            if self._within == 1:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.simplefilter("ignore")

    def leave(self) -> None:
        with self._lock:
            self._within -= 1
            if self._within == 0:
                self._saved.__exit__(None, None, None)


_silence = _WarningFilter()


@contextlib.contextmanager
def suppress_warnings() -> Iterator[None]:
    """Ignore Python warnings while the libraries work; from any thread, and within itself."""
    _silence.enter()
    try:
        yield
    finally:
        _silence.leave()
