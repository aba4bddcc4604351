"""The full-size models of the GPU benchmark, counted on torch's meta device: no weights, no GPU."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu import models
from text2img.engine.deepcache import cached_forward, full_forward
from text2img.engine.devices import silence_libraries, suppress_warnings


@pytest.fixture(autouse=True)
def _silence():
    with suppress_warnings():
        silence_libraries()
        yield


def _millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def _gflop(call):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / 1e9


@pytest.fixture(scope="module")
def denoiser():
    """A model's UNet on the meta device, built once."""

    @functools.cache
    def built(name):
        with suppress_warnings(), torch.device("meta"):
            silence_libraries()
            return models.unet(models.MODELS[name])

    return built


@pytest.mark.parametrize(
    ("name", "unet", "texts"), [("sd15", 859.5, [123.1]), ("sdxl", 2567.5, [123.1, 694.7])]
)
def test_parameters_are_those_of_the_public_checkpoints(denoiser, name, unet, texts):
    """As many weights as the checkpoints have, in millions."""
    model = models.MODELS[name]
    assert _millions(denoiser(name)) == pytest.approx(unet, abs=0.1)
    with torch.device("meta"):
        assert _millions(models.vae(model)) == pytest.approx(83.7, abs=0.1)
        counted = [_millions(encoder) for encoder in models.text_encoders(model)]
    assert counted == pytest.approx(texts, abs=0.1)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_operations_are_those_that_the_figures_are_made_with(denoiser, name):
    """One UNet pass for one picture, without guidance's second half, and decoding one picture."""
    model, unet = models.MODELS[name], denoiser(name)
    side = model.side // 8
    width = model.unet["cross_attention_dim"]
    with torch.device("meta"):
        vae = models.vae(model)
        noise, words = torch.zeros(1, 4, side, side), torch.zeros(1, 77, width)
        more = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        step = _gflop(lambda: unet(noise, torch.tensor(1), words, added_cond_kwargs=more))
        decoding = _gflop(lambda: vae.decode(noise))
    assert step == pytest.approx(model.unet_gflop, rel=1e-3)
    assert decoding == pytest.approx(model.vae_gflop, rel=1e-3)


@pytest.mark.parametrize(("name", "share"), [("sd15", 0.22), ("sdxl", 0.04)])
def test_a_call_with_cached_features_is_the_share_that_is_said(denoiser, name, share):
    """A UNet's outermost layers alone make up the share of a whole call that docs/approximations.md names."""
    model, unet = models.MODELS[name], denoiser(name)
    side, width = model.side // 8, model.unet["cross_attention_dim"]
    with torch.device("meta"):
        noise = torch.zeros(1, 4, side, side)
        more = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
        told = {"timestep": torch.tensor(1), "encoder_hidden_states": torch.zeros(1, 77, width)}
        told["added_cond_kwargs"] = more
        features = full_forward(unet, noise, told)[1]
        cached = _gflop(lambda: cached_forward(unet, noise, told, features))
    assert cached / model.unet_gflop == pytest.approx(share, abs=0.005)


def test_a_picture_with_guidance_takes_two_passes_a_step():
    """20 steps with guidance are 40 passes and one decoding; without it 20."""
    assert models.SD15.gflop(20, 7.5) == pytest.approx(40 * 803.3 + 2515)
    assert models.SD15.gflop(20, 1) == pytest.approx(20 * 803.3 + 2515)


def test_the_tokenizer_is_of_the_full_size_and_reads_letters():
    """49,408 tokens, none of them the same, and a text is not read as nothing."""
    tokenizer = models.tokenizer("!")
    assert len(tokenizer) == 49_408
    ids = tokenizer("a red boat").input_ids
    assert (len(ids), ids[0], ids[-1]) == (10, 49_406, 49_407)
