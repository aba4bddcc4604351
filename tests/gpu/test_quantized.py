"""Weights in 4 and 8 bits by bitsandbytes, which wants a GPU: they load, draw, and take less memory."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from tests.engine.conftest import ask, draw, open_engine, pipe_of
from text2img.engine.devices import suppress_warnings

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_transformer_draws(folder, tmp_path, bits):
    """A folder that bitsandbytes has quantised is loaded as such, and draws about what its own weights do."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes (extra quantized) is not installed")
    copied = shutil.copytree(folder("sd3"), tmp_path / "sd3")
    with suppress_warnings():
        from diffusers import BitsAndBytesConfig, SD3Transformer2DModel

        model = SD3Transformer2DModel.from_pretrained(
            copied / "transformer",
            quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
            dtype=torch.float16,
        )
        shutil.rmtree(copied / "transformer")
        model.save_pretrained(copied / "transformer")
    engine = open_engine(copied, device="cuda", dtype="fp16")
    weight = pipe_of(engine).transformer.transformer_blocks[0].attn.to_q.weight
    assert weight.dtype == (torch.uint8 if bits == 4 else torch.int8)
    (drawn,) = draw(engine, ask(1))
    (plain,) = draw(open_engine(folder("sd3"), device="cuda", dtype="fp16"), ask(1))
    difference = np.abs(drawn.pixels.astype(int) - plain.pixels)
    assert 0 < difference.max() < 64
