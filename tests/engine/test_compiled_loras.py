"""LoRAs in engines that compile: the tiny models, on the CPU. What torch traces is run as it is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from tests.engine import loras
from tests.engine.conftest import ask, open_engine, pipe_of
from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts.parameters import Lora

pytestmark = pytest.mark.compiler


@pytest.fixture(autouse=True)
def forget():
    """Nothing that another test compiled is known to torch."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Studio:
    """An engine that compiles, and one that does not: what both draw, and how the first one did."""

    def __init__(self, folder):
        self.compiled, self.plain = open_engine(folder, compile="always"), open_engine(folder)
        self.graphs, self.calls, self.broken = 0, 0, False
        pipe = self.pipe = pipe_of(self.compiled)
        denoiser = getattr(pipe, "unet", None) or pipe.transformer
        denoiser.compile = partial(denoiser.compile, backend=self._counted)
        denoiser.compile_repeated_blocks = partial(denoiser.compile_repeated_blocks, backend=self._counted)

    def _counted(self, graph, _inputs):
        if self.broken:
            raise RuntimeError("no compiler")
        self.graphs += 1

        def run(*values):
            self.calls += 1
            return graph.forward(*values)

        return run

    def batch(self, *wanted, size=2):
        """Prompts that ask for these LoRAs (file and weight)."""
        asked = tuple(Lora(file, weight) for file, weight in wanted)
        files = tuple(file for file, _ in wanted)
        return [
            self.compiled.prepare(replace(ask(seed, loras=asked), lora_files=files)) for seed in range(size)
        ]

    def generate(self, batch):
        """What the engine that compiles makes of it, as a run has it made."""
        self.compiled.warm_up(batch, 1000)
        made = self.graphs
        results = self.compiled.generate(batch, unheard)
        assert (self.graphs, self.compiled.recompilations) == (made, 0)
        return results

    def draw(self, *wanted):
        """Pictures with these LoRAs, which are the other engine's too; how many graphs were made for them,
        and whether they ran compiled. No graph is made while pictures are.
        """
        batch, made, calls = self.batch(*wanted), self.graphs, self.calls
        pictures = pixels(self.generate(batch))
        assert np.abs(pictures - pixels(self.plain.generate(batch, unheard))).max() <= 1
        return pictures, self.graphs - made, self.calls > calls


def unheard(_done, _of):
    """Told of steps."""


def pixels(pictures):
    return np.stack([image.pixels.astype(int) for image in pictures])


@pytest.fixture
def studio(tiny):
    return Studio(tiny("sd1"))


def style(studio, folder, name, *, keep=lambda _path: True, **how):
    """The file of a LoRA for the studio's model, at the layers to keep."""
    made = loras.halves(studio.pipe, **how)
    return loras.save(folder, loras.tensors({path: pair for path, pair in made.items() if keep(path)}), name)


@pytest.mark.parametrize(
    "family",
    ["sd1", pytest.param("sd3", marks=pytest.mark.models), pytest.param("flux", marks=pytest.mark.models)],
)
def test_switching_compiles_nothing(tiny, tmp_path, family):
    """The first batch with LoRAs is compiled for; from then on those of other ranks, weights and numbers, of
    text encoders too, run on the same code, and each draws what it draws uncompiled.
    """
    studio = Studio(tiny(family))
    text = family != "flux"
    one, other, third = (
        style(studio, tmp_path, str(rank), rank=rank, seed=rank, text=text, size=0.3) for rank in (4, 2, 1)
    )
    plain, _, compiled = studio.draw()
    assert compiled
    first, made, compiled = studio.draw((one, 1.0))
    assert made > 0
    assert compiled
    sets = [[(other, 1.0)], [(one, 0.5)], [(one, 0.5), (third, -1.0)], [(one, 1.0), (other, 0.3), (third, 1)]]
    drawn = [studio.draw(*wanted) for wanted in [*sets, [], [(one, 1.0)]]]
    assert [(made, compiled) for _, made, compiled in drawn] == [(0, True)] * 6
    *styled, plain_again, first_again = [pictures for pictures, _, _ in drawn]
    assert np.array_equal(plain, plain_again)
    assert np.array_equal(first, first_again)
    assert len({pictures.tobytes() for pictures in [plain, first, *styled]}) == 6


@pytest.mark.models
def test_more_room(studio, tmp_path, caplog):
    """LoRAs of a higher rank and further layers are compiled for once, and the others join them there; those
    of too high a rank run uncompiled.
    """
    caplog.set_level("INFO")
    queries = style(studio, tmp_path, "queries", keep=lambda path: path.endswith("to_q"))
    large = style(studio, tmp_path, "large", rank=20, size=0.2)
    beyond = style(studio, tmp_path, "beyond", rank=120, size=0.05)
    drawn = [studio.draw(*((file, 1.0) for file in wanted)) for wanted in ([queries], [large], [queries])]
    assert [(made, compiled) for _, made, compiled in drawn] == [(1, True), (1, True), (0, True)]
    assert np.abs(drawn[0][0] - drawn[2][0]).max() <= 1
    assert studio.draw((beyond, 1.0), (large, 1.0))[1:] == (0, False)
    assert caplog.text.count("LoRAs of this rank") == 1
    assert studio.draw((queries, 1.0))[1:] == (0, True)


@pytest.mark.models
def test_convolutions(studio, tmp_path):
    """A LoRA of convolutions, those that halve the picture among them, runs compiled too."""
    noise = torch.Generator().manual_seed(0)
    made = {}
    for path, module in studio.pipe.unet.named_modules():
        if isinstance(module, torch.nn.Conv2d) and "blocks" in path:
            inputs, outputs, kernel = module.in_channels, module.out_channels, module.kernel_size
            down = torch.randn(2, inputs, *kernel, generator=noise) * 0.1
            up = torch.randn(outputs, 2, 1, 1, generator=noise) * 0.1
            made[f"unet.{path}"] = down, up
    assert any("downsamplers" in path for path in made)
    file = loras.save(tmp_path, loras.tensors(made))
    plain, _, _ = studio.draw()
    styled, _, compiled = studio.draw((file, 1.0))
    assert compiled
    assert np.abs(styled - plain).max() > 10


@pytest.mark.models
def test_without_after_with(studio, tmp_path):
    """A batch without LoRAs is compiled for as such also where one with LoRAs came first. A LoRA of texts
    alone runs on the same code. One that cannot be used fails as ever, and leaves no trace.
    """
    both = style(studio, tmp_path, "both", text=True)
    text = style(studio, tmp_path, "text", text=True, size=2, keep=lambda path: "text_encoder" in path)
    named = loras.tensors(loras.halves(studio.pipe))
    bad = loras.save(tmp_path, {key: value * torch.nan for key, value in named.items()}, "bad")
    styled, with_lora, _ = studio.draw((both, 1.0))
    plain, without, _ = studio.draw()
    assert (with_lora, without) == (1, 1)
    read, made, compiled = studio.draw((text, 1.0))
    assert (made, compiled) == (0, True)
    assert not np.array_equal(read, plain)
    for _ in range(2):
        failed = studio.generate(studio.batch((bad, 1.0)))
        assert all(isinstance(one, PromptFailed) and one.code is ErrorCode.LORA_FAILED for one in failed)
        assert np.array_equal(plain, studio.draw()[0])
        assert np.array_equal(styled, studio.draw((both, 1.0))[0])
    assert studio.graphs == 2


@pytest.mark.models
def test_loras_that_cannot_be_compiled(studio, tmp_path, caplog):
    """Where no code with LoRAs can be made, one warning says so, and batches without go on compiled."""
    styles = [style(studio, tmp_path, str(rank), rank=rank) for rank in (4, 20)]
    studio.draw()
    studio.broken = True
    assert [studio.draw((file, 1.0))[2] for file in styles] == [False, False]
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "compiling with LoRAs failed" in warning.getMessage()
    assert studio.draw()[2]
