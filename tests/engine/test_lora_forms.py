"""The forms that LoRAs are shared in: peft's own, ComfyUI's, of newer pipelines; relatives called by name."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.engine import loras
from tests.engine.conftest import ask, draw, open_engine, pipe_of
from text2img.engine.loras import LoraCache, SourceAllowlist
from text2img.engine.loras.cache import Cache
from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts.parameters import Lora

PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def engine(tiny):
    return open_engine(tiny("sd1"))


def pixels(engine, file):
    request = replace(ask(loras=(Lora(path=str(file), weight=1.0),)), lora_files=(str(file),))
    (image,) = draw(engine, request)
    if isinstance(image, PromptFailed):
        raise image
    return image.pixels


def peft_folder(folder, made, adapter="", **config):
    """What peft's ``save_pretrained`` writes for a denoiser's adapter: names without the component."""
    folder.mkdir()
    named = {
        PREFIX + key.partition(".")[2].replace(".weight", f"{adapter}.weight"): value
        for key, value in loras.tensors(made).items()
    }
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    if config:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize("adapter", ["", ".default"])
def test_peft_folder(engine, tmp_path, adapter):
    """Peft's own folder draws the pixels of diffusers' file, with the scale that its configuration has."""
    made = loras.halves(pipe_of(engine))
    file = peft_folder(tmp_path / "peft", made, adapter, lora_alpha=2, r=4)
    plain = loras.save(tmp_path, loras.tensors(made, alpha=2), "plain")
    assert np.array_equal(pixels(engine, file), pixels(engine, plain))


def test_peft_file_of_another_name(engine, tmp_path):
    """The weights of peft's own file, under a name of its owner's, have a scale of 1."""
    made = loras.halves(pipe_of(engine))
    file = peft_folder(tmp_path / "peft", made)
    with pytest.raises(PromptFailed, match=r"the adapter_config\.json with its scale is missing"):
        pixels(engine, file)
    renamed = file.rename(tmp_path / "style.safetensors")
    plain = loras.save(tmp_path, loras.tensors(made), "plain")
    assert np.array_equal(pixels(engine, renamed), pixels(engine, plain))


@pytest.mark.parametrize(
    ("ends", "name"),
    [
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"), "LoHa"),
        (("lokr_w1", "lokr_w2", "alpha"), "LoKr"),
        (("oft_blocks", "alpha"), "OFT"),
    ],
)
def test_relatives_are_called_by_their_names(engine, tmp_path, ends, name):
    """A LoHa or LoKr is no LoRA for another model, and is not said to be one."""
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    named = {f"{stem}.{end}": torch.ones(() if end == "alpha" else (4, 4)) for end in ends}
    with pytest.raises(PromptFailed, match=f"it is a {name}, whose .* are not supported") as failed:
        pixels(engine, loras.save(tmp_path, named, "relative"))
    assert "another model" not in str(failed.value)


@pytest.mark.parametrize("family", ["qwen", "z-image"])
def test_newer_pipelines(tiny, tmp_path, family):
    """LoRAs of Qwen-Image and Z-Image draw, by diffusers' names and by ComfyUI's alike."""
    engine = open_engine(tiny(family))
    named = loras.tensors(loras.halves(pipe_of(engine)))
    assert named
    own = loras.save(tmp_path, named, "own")
    comfy = {key.replace("transformer.", "diffusion_model.", 1): value for key, value in named.items()}
    (plain,) = draw(engine, ask())
    changed = pixels(engine, own)
    assert (changed != plain.pixels).any()
    assert np.array_equal(changed, pixels(engine, loras.save(tmp_path, comfy, "comfy")))


@pytest.mark.parametrize(
    "path", ["https://loras.example/a/adapter_model.safetensors", "gs://bucket/a/adapter_model.safetensors"]
)
def test_peft_folder_elsewhere(tmp_path, path):
    """Of peft's own folder elsewhere only one file would be fetched: it is refused before any request."""
    cache = LoraCache(
        SourceAllowlist.parse("https://loras.example/a/,gs://bucket/a/"), Cache(tmp_path, 10**9, time.sleep)
    )
    with pytest.raises(PromptFailed, match=r"whose scale is in the adapter_config\.json") as failed:
        cache.file(Lora(path=path, weight=1.0))
    assert failed.value.code is ErrorCode.LORA_FAILED
