"""Pictures of engines that compile: the tiny models, on the CPU."""

from __future__ import annotations

from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from tests.engine.conftest import ask, open_engine, pipe_of
from text2img.engine.devices import suppress_warnings
from text2img.errors import Stopped

pytestmark = pytest.mark.compiler

FAMILIES = ["sd1", "sdxl", "sd3", "flux"]


def denoiser(engine):
    pipe = pipe_of(engine)
    return getattr(pipe, "unet", None) or pipe.transformer


def traced(engine):
    """Has the engine's denoiser compiled without code being generated: what torch traces is run as it is."""
    return with_backend(engine, "eager")


def with_backend(engine, backend):
    module = denoiser(engine)
    module.compile = partial(module.compile, backend=backend)
    module.compile_repeated_blocks = partial(module.compile_repeated_blocks, backend=backend)
    return engine


@pytest.fixture(scope="module")
def compiled(tiny):
    """An engine that has compiled for batches of three."""
    engine = traced(open_engine(tiny("sd1"), compile="always"))
    work(engine, (3,))
    return engine


def work(engine, sizes, *, on_step=lambda _done, _of: None, **wanted):
    """The pictures of batches of these sizes, and how many graphs were compiled outside of warm."""
    pictures, graphs = [], 0
    for size in sizes:
        batch = [engine.prepare(ask(seed, **wanted)) for seed in range(size)]
        engine.warm_up(batch, 1000)
        before = counters["stats"]["unique_graphs"]
        pictures.append(engine.generate(batch, on_step))
        graphs += counters["stats"]["unique_graphs"] - before
    return pictures, graphs


def apart(ours, theirs) -> int:
    pairs = zip(chain(*ours), chain(*theirs), strict=True)
    return max(int(np.abs(one.pixels.astype(int) - other.pixels.astype(int)).max()) for one, other in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(loaded, tiny, family):
    """Each family is compiled without a break in its graph, once for all batches, also the last and smaller
    one, and draws what it draws uncompiled.
    """
    engine = traced(open_engine(tiny(family), compile="always"))
    before = counters["stats"]["unique_graphs"]
    sizes = (3, 3, 2, 1)
    ours, graphs = work(engine, sizes, num_inference_steps=3)
    assert counters["stats"]["unique_graphs"] > before
    assert (graphs, engine.recompilations) == (0, 0)
    assert [len(pictures) for pictures in ours] == list(sizes)
    theirs, _ = work(loaded(family), sizes, num_inference_steps=3)
    assert apart(ours, theirs) <= 1
    assert engine.seconds["compile"] > 0


def test_what_else_may_change(compiled):
    """Steps, guidance, texts and seeds change nothing that was compiled; another size is compiled once."""
    before = counters["stats"]["unique_graphs"]
    for wanted in (
        {"num_inference_steps": 4},
        {"guidance_scale": 9.0},
        {"text": "dogs", "negative_prompt": "x"},
    ):
        work(compiled, (3,), **wanted)
    assert counters["stats"]["unique_graphs"] == before
    for width in (96, 64, 96, 64):
        work(compiled, (3,), width=width)
    assert counters["stats"]["unique_graphs"] == before + 1
    assert compiled.recompilations == 0


def test_steps_told(compiled):
    """A batch that is filled up tells its own steps, as ever, up to the last."""
    told = []
    work(compiled, (2,), num_inference_steps=4, on_step=lambda done, of: told.append((done, of)))
    assert [of for _, of in told] == [4] * len(told)
    assert sorted({done for done, _ in told} - {0}) == [1, 2, 3, 4]


def test_filled_up(compiled):
    """The pictures of a part that is filled up are, bit by bit, those that a whole batch begins with."""
    (whole, part), _ = work(compiled, (3, 2))
    for one, other in zip(part, whole, strict=False):
        assert np.array_equal(one.pixels, other.pixels)


def test_stopped(compiled):
    """A step whose listener raises ends a compiled batch; the engine goes on compiled."""

    def stop(_done, _of):
        raise Stopped(15)

    with pytest.raises(Stopped):
        work(compiled, (3,), on_step=stop)
    before = counters["stats"]["unique_graphs"]
    work(compiled, (3,))
    assert counters["stats"]["unique_graphs"] == before


def test_cannot_be_compiled(loaded, tiny, caplog, capfd):
    """A failing compiler costs one line in the log; the pictures are those of an engine without it."""

    def broken(_graph, _inputs):
        raise RuntimeError("no compiler")

    ours, _ = work(with_backend(open_engine(tiny("sd1"), compile="always"), broken), (2, 2))
    theirs, _ = work(loaded("sd1"), (2, 2))
    assert apart(ours, theirs) == 0
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert capfd.readouterr() == ("", "")


def test_other_pipelines_are_not_compiled(tiny):
    """A pipeline of no known family draws uncompiled, also with always."""
    engine = open_engine(tiny("lcm"), compile="always")
    before = counters["stats"]["unique_graphs"]
    ((image,),), _ = work(engine, (1,))
    assert image.pixels.std() > 1
    assert counters["stats"]["unique_graphs"] == before


@pytest.fixture
def smallest(tmp_path):
    """A model whose UNet is as small as can be, without attention: compiling it takes half a minute."""
    from diffusers import UNet2DConditionModel

    from tests.engine import models

    with suppress_warnings():
        pipe = models.sd1()
        torch.manual_seed(0)
        pipe.register_modules(
            unet=UNet2DConditionModel(
                block_out_channels=(8,),
                layers_per_block=1,
                sample_size=8,
                down_block_types=("DownBlock2D",),
                up_block_types=("UpBlock2D",),
                mid_block_type=None,
                norm_num_groups=4,
                cross_attention_dim=models.HIDDEN,
                attention_head_dim=4,
            )
        )
        pipe.save_pretrained(tmp_path / "smallest")
    return tmp_path / "smallest"


@pytest.mark.models
@pytest.mark.timeout(900)
def test_compiled_for_real(smallest, tmp_path, monkeypatch, capfd):
    """With code generated by the compiler of this machine: pictures differ by rounding, are the same when
    drawn again, nothing is compiled twice, nothing is written to the terminal, and the cache is kept.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # restored afterwards
    cache = tmp_path / "cache"
    engine = open_engine(smallest, compile="always", compile_cache=str(cache))
    ours, graphs = work(engine, (3, 3, 2), num_inference_steps=4)
    theirs, _ = work(open_engine(smallest), (3, 3, 2), num_inference_steps=4)
    assert apart(ours, theirs) <= 1
    assert apart(ours[:1], ours[1:2]) == 0
    assert (graphs, engine.recompilations) == (0, 0)
    assert any(cache.rglob("*.so"))
    assert capfd.readouterr() == ("", "")


def test_feature_cache_compiled_twice_and_never_again():
    """Both kinds of a feature cache's call can be compiled, each as one graph; further steps and runs compile
    nothing more.
    """
    from torch._dynamo.testing import CompileCounter

    from text2img.engine.deepcache import install

    with suppress_warnings():
        from tests.engine import models

        network, counter = models.sd1().unet.eval(), CompileCounter()
        cache = install(network, 2)
        sample, texts = torch.randn(2, 4, 8, 8), torch.randn(2, 77, models.HIDDEN)
        network.compile(backend=counter, fullgraph=True, dynamic=False)
        with torch.no_grad():
            for _ in range(2):
                with cache.run():
                    for step in range(5):
                        network(sample, torch.tensor(900 - 100 * step), encoder_hidden_states=texts)
    assert counter.frame_count == 2
