"""Batches of requests to pictures."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from tests.engine.conftest import ask, draw, open_engine, pipe_of
from text2img.engine import EngineOptions
from text2img.engine.devices import suppress_warnings
from text2img.engine.diffusers import DiffusersEngine
from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts import SCHEDULERS

FAMILIES = ["sd1", "sdxl", "sd3", "flux"]


def apart(one, other) -> int:
    """The most levels by which two pictures differ."""
    return int(np.abs(one.pixels.astype(int) - other.pixels.astype(int)).max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (64, 96), (128, 64)])
def test_pixels(loaded, family, width, height):
    """A picture is uint8, height × width × 3, of the size that was asked for."""
    if family == "sd3" and max(width, height) > 128:
        pytest.skip("larger than the tiny model's positions")
    (image,) = draw(loaded(family), ask(width=width, height=height))
    assert image.pixels.shape == (height, width, 3)
    assert image.pixels.dtype == np.uint8
    assert image.pixels.std() > 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 64)])
def test_same_as_the_pipeline(loaded, family, width, height):
    """The pixels are those that the pipeline, called as its documentation says, would give."""
    engine = loaded(family)
    request = ask(seed=5, negative_prompt="blurry" if family != "flux" else "", width=width, height=height)
    (ours,) = draw(engine, request)
    arguments = {"negative_prompt": ["blurry"]} if family != "flux" else {}
    with suppress_warnings():
        theirs = pipe_of(engine)(
            ["a cat"],
            num_inference_steps=2,
            guidance_scale=5.0,
            width=width,
            height=height,
            generator=[torch.Generator("cpu").manual_seed(5)],
            **arguments,
        )
    assert np.array_equal(ours.pixels, np.asarray(theirs.images[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_neighbours(loaded, family):
    """A picture in a batch is the same as alone, up to one level, with a negative prompt of its own."""
    engine = loaded(family)
    requests = [ask(seed, f"cat {seed}", negative_prompt="x" * (seed % 2)) for seed in range(3)]
    together = draw(engine, *requests)
    for request, image in zip(requests, together, strict=True):
        (alone,) = draw(engine, request)
        assert apart(alone, image) <= 1
    assert apart(together[0], together[1]) > 1


def test_again(loaded):
    """The same batch twice is the same bit by bit: generators are made anew from the seeds."""
    once, twice = (draw(loaded("sd1"), ask(1), ask(2)) for _ in range(2))
    assert [apart(one, other) for one, other in zip(once, twice, strict=True)] == [0, 0]


@pytest.mark.parametrize(
    "change",
    [
        {"text": "dogs"},
        {"negative_prompt": "dogs"},
        {"guidance_scale": 9.0},
        {"num_inference_steps": 3},
        {"seed": 1},
    ],
)
def test_everything_counts(loaded, change):
    """Text, negative prompt, guidance, steps and seed each change the picture."""
    plain, changed = (draw(loaded("sd1"), request)[0] for request in (ask(), ask(**change)))
    assert (plain.pixels != changed.pixels).any()


@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance(loaded, guidance):
    """Guidance of 1 or less, which needs no negative prompt, draws all the same."""
    (image,) = draw(loaded("sdxl"), ask(guidance_scale=guidance, negative_prompt="x"))
    assert image.pixels.std() > 1


def test_flux_without_negative_prompt(loaded):
    """Flux reads no negative prompt: the run's own is left out, and the request says so."""
    engine = loaded("flux")
    with_one, without = draw(engine, ask(negative_prompt="dogs"))[0], draw(engine, ask())[0]
    assert apart(with_one, without) == 0
    prepared = engine.prepare(ask(negative_prompt="dogs"))
    assert (prepared.parameters.negative_prompt, prepared.negative_left_out) == ("", True)


def test_empty_batch(loaded):
    """An empty batch is an empty list."""
    assert loaded("sd1").generate([], lambda _done, _of: None) == []


@pytest.mark.parametrize(
    ("family", "wanted", "message"),
    [
        (
            "sd3",
            {"width": 72},
            "width must be a multiple of 16 with this model; it is 72; use 64 or 80",
        ),
        ("flux", {"height": 72}, "height must be a multiple of 16"),
        ("sd3", {"width": 256}, "width must be at most 128"),
        (
            "sd3",
            {"scheduler": "ddim"},
            "scheduler ddim is not supported by this model; it supports euler, heun",
        ),
        ("flux", {"scheduler": "heun"}, "scheduler heun is not supported"),
        ("sd1", {"scheduler": "lcm", "num_inference_steps": 51}, "num_inference_steps must be at most 50"),
    ],
)
def test_refused(loaded, family, wanted, message):
    """What this model cannot draw is refused before it costs anything, with the field's name."""
    with pytest.raises(PromptFailed, match=message) as caught:
        loaded(family).prepare(ask(**wanted))
    assert caught.value.code is ErrorCode.INVALID_PARAMETERS


def test_used_before_load(tiny):
    """An engine that was not loaded says so."""
    engine = DiffusersEngine(EngineOptions(model=str(tiny("sd1"))))
    with pytest.raises(RuntimeError, match="load"):
        engine.generate([ask()], lambda _done, _of: None)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_steps_told(loaded, scheduler, steps):
    """Steps are told forwards up to the last, however often the scheduler calls back."""
    told = []
    request = ask(scheduler=scheduler, num_inference_steps=steps)
    draw(loaded("sd1"), request, on_step=lambda done, of: told.append((done, of)))
    assert [of for _, of in told] == [steps] * len(told)
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert done[-1] == steps
    assert len(set(done) - {0}) == steps


def test_seconds_and_memory(tiny):
    """Seconds add up by stage, and memory is counted in bytes."""
    engine = DiffusersEngine(EngineOptions(model=str(tiny("sd1")), device="cpu"))
    assert dict(engine.seconds) == {"load": 0, "compile": 0, "denoise": 0, "decode": 0}
    engine.load()
    engine.load()
    draw(engine, ask())
    assert engine.seconds["compile"] == 0
    assert all(0 < engine.seconds[stage] < 60 for stage in ("load", "denoise", "decode"))
    assert 50e6 < engine.peak_memory() < 64e9


def test_nothing_leaks(tiny, capfd, caplog):
    """Loading and drawing write nothing to the terminal: no bars, no warnings, no library's log lines."""
    engine = open_engine(tiny("sd3"))
    draw(engine, ask(text="word " * 200))
    open_engine(tiny("sd1"), dtype="fp16")
    assert capfd.readouterr() == ("", "")
    assert {record.name.split(".")[0] for record in caplog.records} <= {"text2img"}


def test_fp16_on_cpu(tiny):
    """fp16 on the CPU, where somebody asks for it, draws nearly what fp32 draws."""
    half, full = (draw(open_engine(tiny("sd1"), dtype=dtype), ask())[0] for dtype in ("fp16", "fp32"))
    assert np.abs(half.pixels.astype(int) - full.pixels.astype(int)).mean() < 3


def test_a_pipeline_of_no_known_family(loaded):
    """A text-to-image pipeline that the engine has no table for draws with its own scheduler, alone alike."""
    engine = loaded("lcm")
    model_info = engine.inspect()
    assert (
        model_info.family,
        model_info.width,
        model_info.multiple,
        model_info.scheduler,
        model_info.schedulers,
    ) == (
        "other",
        64,
        8,
        "lcm",
        (),
    )
    told = []
    both = draw(engine, ask(0), ask(1), on_step=lambda done, of: told.append((done, of)))
    assert told == [(1, 2), (2, 2)]
    assert apart(both[1], draw(engine, ask(1))[0]) <= 1
    with suppress_warnings():
        theirs = pipe_of(engine)(
            ["a cat", "a cat"],
            num_inference_steps=2,
            guidance_scale=5.0,
            width=64,
            height=64,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(2)],
        )
    assert apart(both[0], type(both[0])(pixels=np.asarray(theirs.images[0]), scheduler="")) == 0
    with pytest.raises(PromptFailed, match="it supports only its own"):
        engine.prepare(ask(scheduler="euler"))
    assert draw(engine, ask(text="a" * 99))[0].truncated


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_prepare_from_other_threads(loaded, family):
    """Requests can be prepared in other threads while a batch is drawn; tokenizers are not shared."""
    engine, text = loaded(family), "a" * 100
    with ThreadPoolExecutor(4) as pool:
        prepared = [pool.submit(engine.prepare, ask(seed, text)) for seed in range(100)]
        drawn = [draw(engine, ask(seed, text))[0] for seed in range(3)]
        chunks = {future.result().chunks for future in prepared}
    assert chunks == {2 if family == "sd1" else 1}
    assert all(image.pixels.std() > 1 for image in drawn)
