"""The memory of checking a LoRA: its header first, and at most twice its file."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import pytest
import torch

from tests.engine import loras
from tests.engine.conftest import pipe_of
from text2img.engine.lora_weights import read_lora
from text2img.errors import ErrorCode, PromptFailed

HUGE = 2**36
"""Bytes of tensors that are not on the disk either: what reads them does not come back."""


def _sparse(tmp_path, entries):
    """A file of these tensors (name: type, shape, bytes), without content."""
    header, start = {}, 0
    for name, (kind, shape, size) in entries.items():
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    file = tmp_path / "huge.safetensors"
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + start)
    return str(file)


@pytest.fixture
def pipe(loaded):
    """The tiny SD 1."""
    return pipe_of(loaded("sd1"))


def _one_of(pipe):
    """The name of a module that takes LoRAs, and its inputs and outputs."""
    name, module = next(iter(loras.attention(pipe).items()))
    return name, module.in_features, module.out_features


@pytest.mark.parametrize("kind", ["U8", "I8", "I64", "BOOL", "F16", "F32"])
def test_what_fits_no_module_is_not_read(pipe, tmp_path, kind):
    """A name that no module has, of any type, is refused by the header."""
    size = {"U8": 1, "I8": 1, "I64": 8, "BOOL": 1, "F16": 2, "F32": 4}[kind]
    assert "the LoRA cannot be used" in _refusal(pipe, _sparse(tmp_path, {"x": (kind, [HUGE // size], HUGE)}))


def test_a_shape_or_rank_that_fits_no_module_is_not_read(pipe, tmp_path):
    """Names of the model's modules do not help: shapes and ranks are in the header, and so are halves."""
    name, inputs, outputs = _one_of(pipe)
    down, up = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
    rank = HUGE // 2 // inputs
    halves = {
        down: ("F16", [rank, inputs], 2 * rank * inputs),
        up: ("F16", [outputs, rank], 2 * rank * outputs),
    }
    assert "has the rank" in _refusal(pipe, _sparse(tmp_path, halves))
    assert "no other half" in _refusal(pipe, _sparse(tmp_path, {down: halves[down]}))
    wide = {**halves, down: ("F16", [4, HUGE // 8], HUGE), up: ("F16", [outputs, 4], 8 * outputs)}
    assert "is for another model" in _refusal(pipe, _sparse(tmp_path, wide))


def test_an_alpha_is_one_number(pipe, tmp_path):
    """An alpha that is a huge tensor is refused by the header as well."""
    name, inputs, outputs = _one_of(pipe)
    entries = {
        f"{name}.lora_A.weight": ("F32", [4, inputs], 16 * inputs),
        f"{name}.lora_B.weight": ("F32", [outputs, 4], 16 * outputs),
        f"{name}.alpha": ("F32", [HUGE // 4], HUGE),
    }
    assert "is not a single number" in _refusal(pipe, _sparse(tmp_path, entries))


def _refusal(pipe, file):
    with pytest.raises(PromptFailed) as caught:
        read_lora(file, pipe)
    assert caught.value.code is ErrorCode.LORA_FAILED
    return str(caught.value)


@pytest.mark.parametrize("style", loras.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_are_computed_in_full_precision(pipe, tmp_path, style, dtype):
    """Alphas are multiplied into weights of any type as fp32, and then only are they rounded, if at all."""
    made = {
        name: tuple(half.to(dtype) for half in halves) for name, halves in loras.halves(pipe, rank=4).items()
    }
    file = loras.save(tmp_path, loras.tensors(made, style, alpha=3))
    (weights,) = read_lora(file, pipe).values()
    for name, (down, up) in made.items():
        path = name.partition(".")[2]
        assert torch.equal(weights[f"{path}.lora_A.weight"], down.float())
        assert torch.equal(weights[f"{path}.lora_B.weight"], up.float() * (3 / 4))


MEASURE = """
import sys
from pathlib import Path
import torch
from text2img.engine.lora_weights import read_lora
from text2img.errors import PromptFailed

def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

class Denoiser(torch.nn.Module):
    config, dtype = {}, torch.float32

    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            for number in range(8):
                setattr(self, f"layer{number}", torch.nn.Linear(4096, 4096))

class Pipe:
    _lora_loadable_modules = ["unet"]
    unet = Denoiser()

    def lora_state_dict(self, tensors, **told):
        return tensors

small, large = sys.argv[1:]
for file in (small, large):
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    try:
        read_lora(file, Pipe())
    except PromptFailed as exc:
        assert "not finite" in str(exc), exc
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's peak")
@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_reading_takes_at_most_twice_the_file(tmp_path, value):
    """A file of fp16 whose weights become fp32, with alphas, at the peak of the process that reads it."""

    def save(name, rank):
        made = {
            f"unet.layer{n}": tuple(
                torch.full(shape, value, dtype=torch.float16) for shape in ((rank, 4096), (4096, rank))
            )
            for n in range(8)
        }
        return loras.save(tmp_path, loras.tensors(made, alpha=8), name)

    small, large = save("small", 1), save("large", 1024)
    command = [sys.executable, "-c", MEASURE, small, large]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size = (tmp_path / "large.safetensors").stat().st_size
    assert size == pytest.approx(2**27, rel=0.01)
    assert int(done.stdout) <= 2 * size + 2**24
