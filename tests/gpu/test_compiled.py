"""Compiled pictures on a CUDA device, with tiny models built in code."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tests.engine import loras
from tests.engine.conftest import ask, open_engine, pipe_of
from text2img.prompts.parameters import Lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FAMILIES = ["sd1", "sdxl", "sd3", "flux"]
SIZES = (4, 4, 3, 1)
LEVELS = {"fp32": 0.05, "fp16": 1.0}
"""How many levels of 255 rounding may move a value, in the mean: a guess, as no GPU was there to measure."""


@pytest.fixture(autouse=True)
def forget():
    """Nothing that another test compiled is known to torch."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder for what is compiled; the variable that names it is restored afterwards."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    return tmp_path / "cache"


def work(engine, sizes, left=1000, **wanted):
    """The pictures of batches of these sizes."""
    made = []
    for size in sizes:
        batch = [engine.prepare(ask(seed, **{"num_inference_steps": 6, **wanted})) for seed in range(size)]
        engine.warm_up(batch, left)
        made.append([image.pixels.astype(int) for image in engine.generate(batch, lambda _done, _of: None)])
    return made


@pytest.mark.parametrize("dtype", LEVELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_alone(folder, cache, family, dtype):
    """Compiled, pictures differ by rounding alone, and nothing is compiled again after the first batch,
    also not for the last and smaller one.
    """
    engine = open_engine(
        folder(family), device="cuda", dtype=dtype, compile="always", compile_cache=str(cache)
    )
    compiled = work(engine, SIZES)
    assert engine.seconds["compile"] > 0
    assert engine.recompilations == 0
    eager = work(open_engine(folder(family), device="cuda", dtype=dtype, compile="never"), SIZES)
    apart = [np.abs(one - other) for one, other in zip(chain(*compiled), chain(*eager), strict=True)]
    assert max(values.mean() for values in apart) <= LEVELS[dtype]


def with_loras(engine, *wanted):
    """The pictures of a batch with these LoRAs (file and weight)."""
    asked = tuple(Lora(file, weight) for file, weight in wanted)
    files = tuple(file for file, _ in wanted)
    batch = [replace(ask(seed, loras=asked, num_inference_steps=6), lora_files=files) for seed in range(4)]
    batch = [engine.prepare(request) for request in batch]
    engine.warm_up(batch, 1000)
    return [image.pixels.astype(int) for image in engine.generate(batch, lambda _done, _of: None)]


@pytest.mark.parametrize("dtype", LEVELS)
@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_loras(folder, cache, tmp_path, family, dtype):
    """LoRAs of all ranks that fit run on one code, and differ from uncompiled ones by rounding alone; without
    them the pictures are, bit by bit, those before.
    """
    engine = open_engine(
        folder(family), device="cuda", dtype=dtype, compile="always", compile_cache=str(cache)
    )
    eager = open_engine(folder(family), device="cuda", dtype=dtype, compile="never")
    one, other = (
        loras.save(tmp_path, loras.tensors(loras.halves(pipe_of(engine), rank=rank, seed=rank)), str(rank))
        for rank in (4, 2)
    )
    (before,) = work(engine, (4,))
    with_loras(engine, (one, 0.5))
    graphs = counters["stats"]["unique_graphs"]
    for wanted in ([(other, 0.5)], [(one, 0.5), (other, -0.3)], [(one, 0.2)]):
        ours, theirs = with_loras(engine, *wanted), with_loras(eager, *wanted)
        assert max(np.abs(a - b).mean() for a, b in zip(ours, theirs, strict=True)) <= LEVELS[dtype]
    (after,) = work(engine, (4,))
    assert all(map(np.array_equal, before, after))
    assert (counters["stats"]["unique_graphs"], engine.recompilations) == (graphs, 0)


def test_again(folder, cache):
    """A compiled batch drawn again is the same, bit by bit, and so it is by an engine with the same cache."""
    options = {"device": "cuda", "compile": "always", "compile_cache": str(cache)}
    one, two = work(open_engine(folder("sd1"), **options), (4, 4))
    torch._dynamo.reset()
    (other,) = work(open_engine(folder("sd1"), **options), (4,))
    for again in (two, other):
        assert all(np.array_equal(*pair) for pair in zip(one, again, strict=True))


@pytest.mark.parametrize("scheduler", [None, "dpm++", "euler", "heun", "lcm"])
def test_schedulers(folder, cache, scheduler):
    """What is compiled in two steps runs all steps, whatever the scheduler, and in both sizes."""
    engine = open_engine(folder("sd1"), device="cuda", compile="always", compile_cache=str(cache))
    for width in (64, 96, 64, 96):
        work(engine, (4,), scheduler=scheduler, width=width, num_inference_steps=10)
    assert engine.recompilations == 0


def test_auto_decides(folder, cache, caplog):
    """With auto the third batch is compiled when ever so many are left, and none when this is the last."""
    caplog.set_level("INFO", logger="text2img")
    engine = open_engine(folder("sd1"), device="cuda", compile="auto", compile_cache=str(cache))
    work(engine, (4, 4, 4), left=4)
    assert engine.seconds["compile"] == 0
    assert "compiling does not pay" in caplog.text
    work(engine, (4, 4, 4), left=10**9)
    assert engine.seconds["compile"] > 0
    assert engine.recompilations == 0
    assert (cache / "text2img-measured.json").exists()


def test_memory_halved(folder, cache):
    """With the device's memory limited, compiling or drawing that does not fit ends in smaller batches or in
    uncompiled ones, never in a failed run; afterwards all is as before.
    """
    engine = open_engine(folder("sd1"), device="cuda", compile="always", compile_cache=str(cache))
    batch = [engine.prepare(ask(seed, width=1024, height=1024)) for seed in range(8)]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**27) / total)
    try:
        engine.warm_up(batch, 1000)
        results = engine.generate(batch, lambda _done, _of: None)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(results) == 8
    ((image,),) = work(engine, (1,))
    assert image.std() > 1
