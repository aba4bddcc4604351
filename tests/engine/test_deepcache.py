"""The feature cache: exact where nothing is reused, forgotten between runs, refused where it cannot work."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from tests.engine.conftest import ask, draw, edit, look, open_engine, pipe_of
from text2img.engine.deepcache import cached_forward, full_forward, install
from text2img.engine.devices import suppress_warnings
from text2img.errors import ConfigurationError

CAPTIONS = {"guidance_scale": 5.0, "num_inference_steps": 7}


@pytest.fixture
def unet():
    """A UNet like the family's, of random weights, and what a pipeline would tell it at one step."""
    with suppress_warnings():
        from tests.engine import models

    def made(family, sides=(8, 8)):
        unet = getattr(models, family)().unet.eval()
        chance = torch.Generator().manual_seed(1)
        told = {
            "timestep": torch.tensor(501),
            "encoder_hidden_states": torch.randn(2, 77, unet.config.cross_attention_dim, generator=chance),
            "timestep_cond": None,
            "added_cond_kwargs": None,
        }
        if family == "sdxl":
            pooled = torch.randn(2, models.HIDDEN, generator=chance)
            told["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}
        return unet, torch.randn(2, 4, *sides, generator=chance), told

    with torch.no_grad():
        yield made


@contextlib.contextmanager
def counting(engine):
    """The calls of the whole UNet and of its middle, while it draws."""
    unet, calls = pipe_of(engine).unet, []
    hooks = [
        unet.register_forward_pre_hook(lambda *_: calls.append("call")),
        unet.mid_block.register_forward_pre_hook(lambda *_: calls.append("deep")),
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("sides", [(8, 8), (9, 6)], ids=str)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_each_call_whole_is_exact(unet, family, sides):
    """With nothing reused the prediction is the UNet's own, bit by bit, also where sides do not halve."""
    network, sample, told = unet(family, sides)
    own = network(sample, **told).sample
    install(network, 1)
    for _ in range(2):
        assert torch.equal(network(sample, **told, return_dict=False)[0], own)
        assert torch.equal(network(sample, **told).sample, own)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_outer_layers_with_fresh_features_are_exact(unet, family):
    """The outer layers give the whole's prediction where the features are this very call's, and read them."""
    network, sample, told = unet(family)
    predicted, features = full_forward(network, sample, told)
    assert torch.equal(cached_forward(network, sample, told, features), predicted)
    assert not torch.equal(cached_forward(network, sample, told, features * 1.1), predicted)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_deep_part_runs_at_every_third_step(tiny, family):
    """Of 7 steps the first, fourth and seventh are whole; of the next batch's again, from its start on."""
    engine = open_engine(tiny(family), feature_cache=3)
    for _ in range(2):
        with counting(engine) as calls:
            draw(engine, ask(1, **CAPTIONS, scheduler="euler"))
        outer_calls = ["call", "call"]
        assert calls == [*(["call", "deep", *outer_calls] * 2), "call", "deep"]


def test_near_and_repeatable(tiny, loaded):
    """The picture is near the plain one and not it; drawn again after another it is the same."""
    engine = open_engine(tiny("sd1"), feature_cache=2)
    (plain,) = draw(loaded("sd1"), ask(3, **CAPTIONS))
    (first,) = draw(engine, ask(3, **CAPTIONS))
    draw(engine, ask(4, **CAPTIONS))
    (again,) = draw(engine, ask(3, **CAPTIONS))
    assert np.array_equal(first.pixels, again.pixels)
    apart = np.abs(first.pixels.astype(int) - plain.pixels).mean()
    assert 0 < apart < 8


def test_nothing_is_kept_of_a_run_that_broke_off(tiny):
    """A batch that runs out of memory in its second step is halved; the halves are drawn as if alone."""
    engine = open_engine(tiny("sd1"), feature_cache=3)
    pairs = [draw(engine, ask(2 * n, **CAPTIONS), ask(2 * n + 1, **CAPTIONS)) for n in range(2)]
    unet = pipe_of(engine).unet
    seen = []

    def full(_module, args):
        seen.append(len(args[0]))
        if len(args[0]) > 4 and len(seen) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = unet.register_forward_pre_hook(full)
    try:
        halved = draw(engine, *(ask(n, **CAPTIONS) for n in range(4)))
    finally:
        hook.remove()
    assert seen[:3] == [8, 8, 4]
    for one, other in zip(halved, [image for pair in pairs for image in pair], strict=True):
        assert np.array_equal(one.pixels, other.pixels)


def test_heun_asks_twice_a_step(tiny):
    """A scheduler that asks the model twice a step has every second question answered by the whole UNet."""
    engine = open_engine(tiny("sd1"), feature_cache=2)
    with counting(engine) as calls:
        draw(engine, ask(1, num_inference_steps=4, scheduler="heun"))
    assert calls.count("call") == 7
    assert calls.count("deep") == 4


def test_off_by_default(tiny, loaded):
    """Neither 0 nor 1 changes a bit or is told of; 2 is told of."""
    (plain,) = draw(loaded("sd1"), ask(3))
    one = open_engine(tiny("sd1"), feature_cache=1)
    (same,) = draw(one, ask(3))
    assert np.array_equal(plain.pixels, same.pixels)
    assert loaded("sd1").inspect().approximations == one.inspect().approximations == {}
    assert look(tiny("sd1"), feature_cache=2).approximations == {"feature_cache": 2}


@pytest.mark.parametrize("family", ["sd3", "flux", "lcm"])
def test_models_without_such_a_unet_are_refused(tiny, family):
    """It is the option that does not fit: wrong usage, found by inspection, in a sentence that names it."""
    with pytest.raises(ConfigurationError, match="leave out --feature-cache"):
        look(tiny(family), feature_cache=3)
    look(tiny(family), feature_cache=1)


@pytest.mark.parametrize(
    "change",
    [
        {"down_block_types": ["AttnDownBlock2D", "CrossAttnDownBlock2D"]},
        {"up_block_types": ["CrossAttnUpBlock2D", "AttnUpBlock2D"]},
        {"num_class_embeds": 3},
        {"center_input_sample": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_unets_of_another_kind_are_refused(copy, change):
    """A UNet whose outermost blocks or inputs are others than those that were tried is refused, too."""
    folder = copy("sd1")
    edit(folder / "unet" / "config.json", **change)
    with pytest.raises(ConfigurationError, match="does not support the block types"):
        look(folder, feature_cache=3)


def test_nothing_is_passed_over(unet):
    """An argument that it would have to leave out is an error, and an absent one is not."""
    network, sample, told = unet("sd1")
    install(network, 2)
    with pytest.raises(TypeError, match="cross_attention_kwargs"):
        network(sample, **told, cross_attention_kwargs={"scale": 0.5})
    network(sample, **told, cross_attention_kwargs=None)
