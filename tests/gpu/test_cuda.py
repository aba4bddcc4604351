"""The engine on a CUDA device, with tiny models built in code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from text2img.engine.quiet import hush, quiet

with quiet():
    hush()
    from tests.engine import models
from tests.engine.conftest import ask, draw, open_engine, pipe_of
from text2img.errors import ErrorCode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FAMILIES = ["sd1", "sdxl", "sd3", "flux"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")

    def saved(family):
        path = root / family
        with quiet():
            return path if path.exists() else models.save(family, path)

    return saved


@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_by_itself(folder, family):
    """On a GPU auto is fp16, and each family draws."""
    engine = open_engine(folder(family), device="auto")
    pipe = pipe_of(engine)
    assert (pipe.vae.dtype, pipe.device.type) == (torch.float16, "cuda")
    for picture in draw(engine, *(ask(seed) for seed in range(3))):
        assert picture.pixels.std() > 1


def test_channels_last(folder):
    """Convolutions' weights lie channels last."""
    unet = pipe_of(open_engine(folder("sd1"), device="cuda")).unet
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("family", FAMILIES)
def test_seeds_agree_with_the_cpu(folder, family):
    """The same seed gives nearly the same picture on both: noise is made on the CPU."""
    requests = [ask(seed) for seed in range(2)]
    cpu = draw(open_engine(folder(family), device="cpu"), *requests)
    gpu = draw(open_engine(folder(family), device="cuda", dtype="fp32"), *requests)
    for one, other in zip(cpu, gpu, strict=True):
        assert np.abs(one.pixels.astype(int) - other.pixels.astype(int)).mean() < 2


def test_memory_is_the_devices(folder):
    """Peak memory is what torch counted on the device."""
    engine = open_engine(folder("sd1"), device="cuda")
    draw(engine, ask())
    assert engine.peak_memory() == torch.cuda.max_memory_allocated()


def test_out_of_memory(folder):
    """With the device's memory limited, a batch is halved or its prompts fail; then all is as before."""
    engine = open_engine(folder("sd1"), device="cuda")
    (before,) = draw(engine, ask(width=512, height=512))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**22) / total)
    try:
        results = draw(engine, *(ask(seed, width=1024, height=1024) for seed in range(4)))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert {getattr(result, "code", None) for result in results} == {ErrorCode.OUT_OF_MEMORY}
    (after,) = draw(engine, ask(width=512, height=512))
    assert np.abs(after.pixels.astype(int) - before.pixels.astype(int)).max() <= 1
