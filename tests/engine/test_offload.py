"""Weights that wait in the host's memory: the same pictures, wherever the hooks take them; refused where it
cannot be.

Without a GPU the hooks take the weights from the host to the host: all of them run, and what is not taken
along by one is still missing (on torch's ``meta`` device), as it would be beside a GPU.
"""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

from tests.engine import loras
from tests.engine.conftest import ask, draw, look, open_engine, pipe_of
from text2img.engine.devices import suppress_warnings
from text2img.engine.loading import offload
from text2img.errors import ConfigurationError, Stopped
from text2img.prompts.parameters import Lora

HOW = ["model", "sequential"]
REQUESTS = (ask(1, "a dog"), ask(2, "a cat"), ask(3, "a dog"))


class Copies(dict):
    """Weights of which each use gets a copy, as one gets that takes them to a GPU."""

    def __getitem__(self, name):
        return super().__getitem__(name).clone()


def let_wait(engine, how):
    """Have the weights of an engine on the CPU wait for their use."""

    def again():
        if how == "model":
            offload(pipe_of(engine), how, "cpu")
            return
        for part in modules_of(engine):  # as diffusers does, but for the copies
            own = len(part._parameters) > 0
            cpu_offload(part, torch.device("cpu"), offload_buffers=own, state_dict=Copies(part.state_dict()))

    with suppress_warnings():
        again()
    engine._loaded = replace(engine._loaded, offload=again)
    return engine


@pytest.fixture(scope="module")
def placed(tiny):
    """A family's engine whose weights do not wait, loaded once."""
    return functools.cache(lambda family, **options: in_place(tiny(family), **options))


def in_place(folder, **options):
    """An engine whose weights do not wait, in memory of their own: not where the file lies in memory, where
    they may be aligned otherwise, which rounds otherwise.
    """
    engine = open_engine(folder, **options)
    for part in modules_of(engine):
        for weight in part.parameters():
            weight.data = weight.data.clone(memory_format=torch.preserve_format)
    return engine


def modules_of(engine):
    return [part for part in pipe_of(engine).components.values() if isinstance(part, torch.nn.Module)]


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert np.array_equal(one.pixels, other.pixels)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_same_pictures(tiny, placed, family, how):
    """Each family draws, batch after batch, bit by bit what it draws with all weights in their place."""
    engine = let_wait(open_engine(tiny(family)), how)
    expected = draw(placed(family), *REQUESTS)
    assert_same(draw(engine, *REQUESTS), expected)
    assert_same(draw(engine, *REQUESTS), expected)


def test_layers_wait(tiny):
    """Before and after a batch, no layer's weights are in their place with ``sequential``."""
    engine = let_wait(open_engine(tiny("sd1")), "sequential")
    for _ in range(2):
        assert {weight.device.type for part in modules_of(engine) for weight in part.parameters()} == {"meta"}
        draw(engine, ask())


@pytest.mark.parametrize("how", HOW)
def test_in_half_precision_with_a_vae_in_fp32(tiny, placed, how):
    """XL's VAE, which is run in fp32 where the model is in fp16, is so as well where its weights wait."""
    expected = draw(placed("sdxl", dtype="fp16"), *REQUESTS)
    assert_same(draw(let_wait(open_engine(tiny("sdxl"), dtype="fp16"), how), *REQUESTS), expected)


@pytest.mark.parametrize("how", HOW)
def test_with_a_feature_cache(tiny, placed, how):
    """A feature cache takes the place of the UNet's forward and is still used, within the hooks."""
    options = {"feature_cache": 2}
    requests = [ask(seed, num_inference_steps=4) for seed in range(2)]
    expected = draw(placed("sd1", **options), *requests)
    engine, calls = let_wait(open_engine(tiny("sd1"), **options), how), []
    pipe_of(engine).unet.mid_block.register_forward_pre_hook(lambda *_: calls.append("deep"))
    assert_same(draw(engine, *requests), expected)
    assert len(calls) == 3  # of five


@pytest.mark.parametrize("how", HOW)
def test_goes_on_after_an_interruption(tiny, placed, how):
    """What a listener raises ends the batch; the weights that it used go back, and the next is as ever."""
    engine = let_wait(open_engine(tiny("sd1")), how)

    def stop(_done, _of):
        raise Stopped(15)

    with pytest.raises(Stopped):
        draw(engine, ask(), on_step=stop)
    assert_same(draw(engine, *REQUESTS), draw(placed("sd1"), *REQUESTS))


@pytest.mark.parametrize("how", HOW)
def test_with_loras(tiny, placed, tmp_path, how):
    """LoRAs are loaded, switched and left out as ever; what is drawn with and without them is the same."""
    engine, twin = let_wait(open_engine(tiny("sd1")), how), placed("sd1")
    files = [
        loras.save(tmp_path, loras.tensors(loras.halves(pipe_of(twin), seed=seed, text=True)), str(seed))
        for seed in range(2)
    ]
    for chosen in (files[:1], [], files[1:], files, files[:1], []):
        request = replace(
            ask(loras=tuple(Lora(path=file, weight=1.0) for file in chosen)), lora_files=tuple(chosen)
        )
        assert_same(draw(engine, request), draw(twin, request))


def test_no_gpu(tiny, caplog):
    """With ``auto`` on a machine without a GPU it does nothing, and says so."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with caplog.at_level(logging.WARNING):
        engine = open_engine(tiny("sd1"), device="auto", offload="model")
    assert "--offload model has no effect" in caplog.text
    assert not hasattr(pipe_of(engine).unet, "_hf_hook")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu"}, "leave out --offload, or use --device cuda"),
        ({"device": "auto", "compile": "always"}, "leave out --compile always or --offload"),
    ],
)
def test_refused(tiny, options, message):
    """What cannot be is said when the model is inspected, before anything is claimed."""
    with pytest.raises(ConfigurationError, match=message):
        look(tiny("sd1"), offload="model", **options)


def test_memory_is_given_back(tiny):
    """After ``close`` none of the model's tensors is alive; another model, or the same again, then loads."""
    engine = open_engine(tiny("sd1"))
    before = draw(engine, ask())
    weights = [weakref.ref(weight) for part in modules_of(engine) for weight in part.parameters()]
    assert len(weights) > 20
    engine.close()
    gc.collect()
    assert not any(weight() is not None for weight in weights)
    engine.close()  # again: nothing
    other = open_engine(tiny("sdxl"))
    draw(other, ask())
    engine.load()
    assert_same(draw(engine, ask()), before)
