"""Which devices there are, and what exceptions say about them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.engine.conftest import look
from text2img.engine import EngineOptions
from text2img.engine.devices import (
    FailureKind,
    check_device,
    check_dtype,
    choose_device,
    choose_dtype,
    classify_error,
)
from text2img.engine.model_folder import is_stored_in_bf16, read_folder
from text2img.errors import ConfigurationError, DeviceFailed

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_always_there(device):
    """The CPU is always there, and auto finds something."""
    check_device(device)
    assert choose_device(device) in {"cuda", "mps", "cpu"}


@no_gpu
def test_no_gpu(tiny):
    """Asking for cuda without a GPU is an error at once, which says what to do."""
    with pytest.raises(DeviceFailed, match=r"--gpus all.*--device cpu"):
        check_device("cuda")
    with pytest.raises(DeviceFailed, match="--gpus all"):
        look(tiny("sd1"), device="cuda")
    with pytest.raises(DeviceFailed, match="build of PyTorch"):
        choose_device("cuda")


@pytest.mark.skipif(sys.platform == "darwin", reason="this may be Apple silicon")
def test_no_mps():
    """Mps elsewhere than on Apple silicon is an error."""
    with pytest.raises(DeviceFailed, match="mps"):
        check_device("mps")


def test_check_needs_no_torch():
    """The check imports no torch."""
    code = (
        "import sys; from text2img.engine.devices import check_device; check_device('cpu');"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.float16),
        ("auto", "mps", torch.float16),
        ("bf16", "cuda", torch.bfloat16),
        ("fp32", "cuda", torch.float32),
        ("fp16", "cpu", torch.float16),
    ],
)
def test_dtype(dtype, device, expected):
    """Auto is fp16 on a GPU and fp32 on the CPU."""
    assert choose_dtype(EngineOptions(model="m", dtype=dtype), device) is expected


@pytest.mark.parametrize(
    ("exc", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), FailureKind.MEMORY),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), FailureKind.MEMORY),
        (RuntimeError("CUDA error: unspecified launch failure"), FailureKind.DEVICE),
        (RuntimeError("HIP error: invalid device function"), FailureKind.DEVICE),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), FailureKind.OTHER),
        (ValueError("out of memory"), FailureKind.OTHER),
        (OSError(12, "Cannot allocate memory"), FailureKind.MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling"), FailureKind.UNCLEAR),
        (RuntimeError("FIND was unable to find an engine to execute this"), FailureKind.UNCLEAR),
        (RuntimeError("NVML_SUCCESS == r INTERNAL ASSERT FAILED"), FailureKind.MEMORY),
        (RuntimeError("CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), FailureKind.MEMORY),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), FailureKind.DEVICE),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), FailureKind.DEVICE),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), FailureKind.OTHER),
        (RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling"), FailureKind.OTHER),
    ],
)
def test_trouble(exc, expected):
    """Exceptions are told apart by class and message."""
    assert classify_error(exc) is expected


@pytest.fixture(params=[True, False], ids=["with bf16", "without bf16"])
def card(request, monkeypatch):
    """A GPU that can, or cannot, compute in bf16; only what is asked about it exists."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: request.param)
    monkeypatch.setattr("text2img.engine.devices._gpu_exists", lambda: True)
    return request.param


def test_auto_is_bf16_for_transformers_with_such_weights(card):
    """On a card with bf16 auto is the dtype of a transformer's weights; elsewhere fp16, on the CPU fp32."""
    options = EngineOptions(model="")
    assert choose_dtype(options, "cuda", stored_bf16=True) is (torch.bfloat16 if card else torch.float16)
    assert choose_dtype(options, "cuda") is torch.float16
    assert choose_dtype(options, "cpu", stored_bf16=True) is torch.float32


def test_bf16_on_a_card_without_it(card):
    """A requested bf16 that the card does not have is wrong usage, found before anything is claimed."""
    options = EngineOptions(model="", dtype="bf16")
    if card:
        check_dtype(options)
        return
    with pytest.raises(ConfigurationError, match="does not compute in bf16; use fp16"):
        check_dtype(options)
    check_dtype(EngineOptions(model="", dtype="bf16", device="cpu"))


@pytest.mark.parametrize(("family", "expected"), [("qwen", True), ("sd1", False)])
def test_stored_dtype(tiny, tmp_path, family, expected):
    """The weight files tell whether a transformer's weights are bf16; a UNet's do not count."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(tiny(family), dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path / "half")
    half, full = (read_folder(path, None, safety_checker=False) for path in (tmp_path / "half", tiny(family)))
    plain = dict.fromkeys(half.components)
    assert is_stored_in_bf16(half, plain) is expected
    assert not is_stored_in_bf16(full, plain)
