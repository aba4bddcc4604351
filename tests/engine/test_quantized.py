"""Models with quantised weights, or without some components: they draw, or say what is missing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.conftest import ask, draw, edit, look, open_engine, pipe_of
from text2img.engine.devices import suppress_warnings
from text2img.engine.inspection import check_complete
from text2img.engine.model_folder import Component, ModelFolder
from text2img.errors import ConfigurationError


def config_of(method):
    """How the library is asked for 8 bits a weight."""
    if method == "torchao":
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(version=2))
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype="int8")


@pytest.mark.parametrize(("method", "library"), [("torchao", "torchao"), ("quanto", "optimum.quanto")])
def test_a_quantised_folder_draws(tiny, loaded, tmp_path, method, library):
    """A transformer in 8 bits is loaded as such, and draws almost the image of its own weights."""
    with suppress_warnings():
        pytest.importorskip(library, reason=f"{library} (extra quantized) is not installed")
    folder = shutil.copytree(tiny("sd3"), tmp_path / "sd3")
    with suppress_warnings():
        from diffusers import SD3Transformer2DModel

        model = SD3Transformer2DModel.from_pretrained(
            folder / "transformer", quantization_config=config_of(method), dtype=torch.float32
        )
        shutil.rmtree(folder / "transformer")
        model.save_pretrained(folder / "transformer")
    engine = open_engine(folder)
    assert type(pipe_of(engine).transformer.transformer_blocks[0].attn.to_q.weight) is not torch.nn.Parameter
    (drawn,), (plain,) = draw(engine, ask(1)), draw(loaded("sd3"), ask(1))
    difference = np.abs(drawn.pixels.astype(int) - plain.pixels)
    assert 0 < difference.max() < 16


@pytest.mark.parametrize(
    ("quantized", "module", "says"),
    [
        (
            {"quant_method": "bitsandbytes"},
            "bitsandbytes",
            "unet is quantised by bitsandbytes, and bits",
        ),
        (
            {"load_in_4bit": True},
            "bitsandbytes",
            "bitsandbytes is not installed; install it: pip",
        ),
        ({"quant_method": "torchao"}, "torchao", "torchao is not installed; install it: pip install torchao"),
        (
            {"quant_method": "quanto"},
            "optimum.quanto",
            "optimum-quanto is not installed; install it",
        ),
        ({"quant_method": "novel"}, "novel", "quantised by novel, which text2img does not load"),
        ({}, "none", "quantised by unknown means"),
    ],
    ids=["bnb", "old-bnb", "torchao", "quanto", "unknown", "unnamed"],
)
def test_a_library_that_is_missing(copy, monkeypatch, quantized, module, says):
    """Wrong usage, found by inspection: component, method, and what to install."""
    folder = copy("sd1")
    edit(folder / "unet" / "config.json", quantization_config=quantized)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigurationError, match=says):
        look(folder)


def test_a_library_that_needs_a_gpu(copy, monkeypatch):
    """Bitsandbytes on the CPU is wrong usage though it is installed."""
    folder = copy("sd1")
    edit(folder / "unet" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    monkeypatch.setitem(sys.modules, "bitsandbytes", sys)
    with pytest.raises(ConfigurationError, match="which needs a CUDA device, and this run's is cpu"):
        look(folder)


def test_a_model_without_its_t5_draws(copy):
    """Components that the index names as null are None in the pipeline, which draws as diffusers does."""
    folder = copy("sd3")
    edit(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    (drawn,) = draw(open_engine(folder), ask(1))
    with suppress_warnings():
        from diffusers import StableDiffusion3Pipeline

        pipe = StableDiffusion3Pipeline.from_pretrained(
            folder, local_files_only=True, text_encoder_3=None, tokenizer_3=None
        )
        pipe.set_progress_bar_config(disable=True)
        (image,) = pipe(
            "a cat",
            num_inference_steps=2,
            guidance_scale=5.0,
            width=64,
            height=64,
            generator=torch.Generator().manual_seed(1),
        ).images
    assert np.abs(np.asarray(image).astype(int) - drawn.pixels).max() <= 1


HIDREAM = (
    *("scheduler", "vae", "transformer", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    *("text_encoder_3", "tokenizer_3", "text_encoder_4", "tokenizer_4"),
)


@pytest.mark.parametrize(
    ("pipeline", "listed", "missing"),
    [
        (
            "HiDreamImagePipeline",
            HIDREAM[:-2],
            "no text_encoder_4 and no tokenizer_4, which HiDream",
        ),
        ("IFPipeline", ("scheduler", "unet", "tokenizer"), "no text_encoder, which IFPipeline needs"),
        ("HiDreamImagePipeline", HIDREAM, None),
        ("KolorsPipeline", ("scheduler", "unet", "vae", "text_encoder", "tokenizer"), None),
        ("StableDiffusion3PAGPipeline", HIDREAM[:7], None),
    ],
    ids=["hidream", "if", "whole-hidream", "kolors", "sd3"],
)
def test_what_a_pipeline_cannot_do_without(pipeline, listed, missing):
    """A component that is null or absent is wrong usage where the pipeline needs it, and fine elsewhere."""
    here = Path("model")
    components = {
        name: Component(name=name, library="diffusers", class_name="Any", folder=here) for name in listed
    }
    model = ModelFolder(path=here, revision=None, pipeline=pipeline, components=components)
    if missing is None:
        check_complete(model)
        return
    with pytest.raises(ConfigurationError, match=missing):
        check_complete(model)
