"""Whether a model's parts belong together: vocabularies, schedulers and widths, before weights are read."""

from __future__ import annotations

import json

import pytest

from tests.engine.conftest import edit, look, split_vocabulary
from text2img.errors import ModelFailed


@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_tokenizer_without_vocabulary(copy, family):
    """A tokenizer folder without its vocabulary, which would load and read nothing, is an error."""
    name = "tokenizer_2" if family == "flux" else "tokenizer"
    folder = copy(family)
    (folder / name / "tokenizer.json").unlink()
    with pytest.raises(ModelFailed, match="no vocabulary"):
        look(folder)


@pytest.mark.parametrize("change", [-20, 1])
def test_clip_vocabulary_size(copy, change):
    """CLIP's tokenizer and text encoder must know the same number of tokens."""
    folder = copy("sd1")
    config = json.loads((folder / "text_encoder/config.json").read_text())
    edit(folder / "text_encoder/config.json", vocab_size=config["vocab_size"] - change)
    with pytest.raises(ModelFailed, match="they do not match"):
        look(folder)


@pytest.mark.parametrize(("rows", "fits"), [(49, True), (58, True), (40, False), (4000, False)])
def test_t5_vocabulary_size(copy, rows, fits):
    """T5's embedding may be padded by some rows, not smaller than the vocabulary nor of another."""
    folder = copy("flux")
    edit(folder / "text_encoder_2/config.json", vocab_size=rows)
    if fits:
        assert look(folder).family == "flux"
    else:
        with pytest.raises(ModelFailed, match="tokenizer_2"):
            look(folder)


def test_vocab_with_merges(copy):
    """vocab.json counts as a vocabulary beside its merges.txt, and not without."""
    folder = copy("sd1")
    split_vocabulary(folder / "tokenizer")
    assert look(folder).family == "sd"
    (folder / "tokenizer/merges.txt").unlink()
    with pytest.raises(ModelFailed, match="no vocabulary"):
        look(folder)


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        ("sd1", "FlowMatchEulerDiscreteScheduler"),
        ("sd3", "DDIMScheduler"),
        ("flux", "PNDMScheduler"),
        ("sd1", "NoScheduler"),
    ],
)
def test_scheduler_of_another_family(copy, family, scheduler):
    """A scheduler of another family, which would draw noise without a word, is an error."""
    folder = copy(family)
    edit(folder / "model_index.json", scheduler=["diffusers", scheduler])
    with pytest.raises(ModelFailed, match=scheduler):
        look(folder)


@pytest.mark.parametrize(
    ("family", "file", "change"),
    [
        ("sd1", "unet", {"cross_attention_dim": 48}),
        ("sd1", "unet", {"in_channels": 9}),
        ("sdxl", "unet", {"cross_attention_dim": 32}),
        ("sdxl", "text_encoder_2", {"projection_dim": 48}),
        ("sd3", "transformer", {"joint_attention_dim": 48}),
        ("sd3", "text_encoder_2", {"projection_dim": 48}),
        ("flux", "transformer", {"pooled_projection_dim": 48}),
        ("flux", "text_encoder_2", {"d_model": 48}),
    ],
)
def test_parts_of_different_models(copy, family, file, change):
    """Components whose widths disagree are of different models."""
    folder = copy(family)
    edit(folder / file / "config.json", **change)
    with pytest.raises(ModelFailed, match="from different models"):
        look(folder)
