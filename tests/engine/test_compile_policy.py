"""When something is compiled and which batches run on it: a small module, compiled for real without code
being generated (the backend "eager"), so that what is shown is when torch compiles.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from tests.engine.conftest import ask
from text2img.engine.compile_policy import CompileCache, CompilePolicy, Compiler, Estimate
from text2img.engine.devices import suppress_warnings
from text2img.engine.lora_adapters import Adapters
from text2img.errors import DeviceFailed, Stopped

pytestmark = pytest.mark.compiler

EVER = 10**9  # prompts left: it pays
NONE = 1  # it does not


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Denoiser(torch.nn.Module):
    """One layer; ``backend`` is what compiles it."""

    dtype = torch.float32

    def __init__(self, backend):
        super().__init__()
        self.layer, self.backend = torch.nn.Linear(2, 2), backend

    def forward(self, values):
        return self.layer(values) + 1

    def compile(self, **how):
        super().compile(backend=self.backend, **how)


class Desk:
    """Draws parts as an engine does: warm, then within running."""

    def __init__(self, mode="always", device="cpu", folder=None, backend="eager", most=None, **more):
        self.denoiser = Denoiser(backend)
        self.compiling = CompilePolicy(
            Compiler(self.denoiser, device, Adapters(None)), mode, CompileCache(folder), **more
        )
        self.rehearsed, self.rows, self.most = [], [], most

    def rehearse(self, part):
        self.rehearsed.append(len(part))
        self.denoiser(torch.zeros(len(part), 2))

    def draw(self, size, left=EVER, **wanted):
        """Compiles that drawing made, those of warming up aside."""
        part = [ask(seed, **wanted) for seed in range(size)]
        with suppress_warnings():
            self.compiling.warm_up(part, left, self.most, self.rehearse)
            before = graphs()
            with self.compiling.running(part, self.most) as rows:
                self.rows.append(rows)
                self.denoiser(torch.zeros(rows, 2))
        return graphs() - before


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """Nothing that another test compiled is known to torch; the variable that a cache sets is restored."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_always():
    """With always the first batch of a shape compiles; the smaller last ones are filled up or run as they
    are, and nothing is compiled again.
    """
    desk = Desk()
    assert [desk.draw(size) for size in (4, 4, 3, 2, 1)] == [0] * 5
    assert desk.rehearsed == [4]
    assert desk.rows == [4, 4, 4, 2, 1]  # two or one in four rows would cost more than it saves
    assert desk.compiling.recompilations == 0


def test_larger_and_other_shapes():
    """A larger batch and another shape are compiled for themselves, once each; what was compiled stays."""
    desk = Desk()
    before = graphs()
    for _ in range(2):
        for size, width in ((2, 64), (4, 64), (3, 64), (2, 128)):
            assert desk.draw(size, width=width) == 0
    assert desk.rehearsed == [2, 4, 2]
    assert desk.rows == [2, 4, 4, 2] * 2
    assert graphs() - before <= 3
    assert desk.compiling.recompilations == 0


def test_never():
    """With never nothing is compiled, and torch is not even asked to."""
    desk = Desk("never")
    assert [desk.draw(4) for _ in range(3)] == [0] * 3
    assert (desk.rehearsed, desk.rows) == ([], [4] * 3)
    assert desk.denoiser._compiled_call_impl is None


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_auto_off_a_gpu(device):
    """With auto nothing is compiled on the CPU and on Apple's, however long the run."""
    desk = Desk("auto", device)
    for _ in range(4):
        desk.draw(4)
    assert desk.rehearsed == []


def test_auto_measures_first(caplog):
    """With auto the first batch warms up, the second is measured, and the third is compiled if that pays."""
    caplog.set_level("INFO")
    desk = Desk("auto", "cuda")
    for _ in range(3):
        desk.draw(4, left=NONE)
    assert desk.rehearsed == []
    assert caplog.text.count("compiling does not pay: 1 prompts") == 1  # said once, with its figures
    desk.draw(4)
    assert desk.rehearsed == [4]
    assert "compiling pays: 1000000000 prompts" in caplog.text
    assert "nothing was measured yet" in caplog.text


def test_auto_counts_the_shape(caplog):
    """Only the prompts of the shape count: of a queue that is half of another, half."""
    caplog.set_level("INFO")
    desk = Desk("auto", "cuda")
    for _ in range(3):
        desk.draw(4, left=100, width=64)
        desk.draw(4, left=100, width=128)
    assert "does not pay: 60 prompts" in caplog.text  # 12 of 20 were wide when a wide one was to decide
    assert "does not pay: 50 prompts" in caplog.text  # 12 of 24 were tall
    assert desk.rehearsed == []


class Slow:
    """A clock, and a backend whose code takes a second of it more than what it compiled."""

    def __init__(self):
        self.now = 0.0

    def clock(self):
        self.now += 0.1  # what drawing takes: each call is a begin or an end
        return self.now

    def backend(self, graph, _inputs):
        def run(*values):
            self.now += 1.0
            return graph.forward(*values)

        return run


def test_measured_and_remembered(tmp_path):
    """What compiling brought is kept for the next run, which decides by it: here it brought a loss."""
    slow = Slow()
    desk = Desk("auto", "cuda", str(tmp_path), backend=slow.backend, clock=slow.clock)
    for _ in range(6):
        desk.draw(4)
    assert desk.rehearsed == [4]  # compiled, measured, given up
    kept = CompileCache(str(tmp_path))._read()
    ((key, known),) = kept.items()
    assert (round(known["gain"], 6), round(known["cost"], 6)) == (-10.0, 1.1)  # 1.1 s, where it was 0.1 s
    assert "Denoiser of 6 weights in torch.float32" in key
    assert f"torch {torch.__version__}" in key
    later = Desk("auto", "cuda", str(tmp_path), backend=slow.backend, clock=slow.clock)
    for _ in range(6):
        later.draw(4)
    assert later.rehearsed == []


def test_known_from_an_earlier_run(tmp_path, caplog):
    """Where an earlier run measured a gain and a cost, the break-even is theirs and not the assumed one."""
    caplog.set_level("INFO")
    first = Desk("auto", "cuda", str(tmp_path))
    for _ in range(5):
        first.draw(4)
    (key,) = CompileCache(str(tmp_path))._read()
    CompileCache(str(tmp_path)).put(key, Estimate(gain=0.5, cost=0.0))
    later = Desk("auto", "cuda", str(tmp_path))
    for _ in range(3):
        later.draw(4, left=NONE)
    assert later.rehearsed == [4]
    assert "measured in an earlier run" in caplog.text


def broken(_graph, _inputs):
    raise RuntimeError("no compiler\nin sight")


def test_no_compiler(caplog):
    """Where compiling fails there is one line in the log, and all goes on uncompiled."""
    desk = Desk(backend=broken)
    assert [desk.draw(size, width=width) for size, width in ((4, 64), (4, 128), (4, 64))] == [0] * 3
    assert desk.rehearsed == [4]
    (warning,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "runs uncompiled: BackendCompilerFailed" in warning.getMessage()
    assert "\n" not in warning.getMessage()


def test_memory_while_warming(caplog):
    """Where compiling needs too much memory, batches of that size run uncompiled and others may compile."""
    caplog.set_level("INFO")
    desk = Desk()

    def rehearse(part):
        desk.rehearsed.append(len(part))
        if len(part) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        desk.denoiser(torch.zeros(len(part), 2))

    desk.rehearse = rehearse
    for size in (4, 4, 2):
        desk.draw(size)
    assert desk.rehearsed == [4, 2]
    assert caplog.text.count("not enough memory") == 1


def test_memory_while_drawing():
    """When a compiled size no longer fits, parts are not filled up to it any more."""
    desk = Desk()
    desk.draw(4)
    part = [ask(seed) for seed in range(3)]
    with pytest.raises(torch.OutOfMemoryError), desk.compiling.running(part, None) as rows:
        assert rows == 4
        raise torch.OutOfMemoryError("CUDA out of memory")
    with desk.compiling.running(part, None) as rows:
        assert rows == 3


def test_no_more_rows_than_fit():
    """A part is filled up to no more than what is known to fit."""
    desk = Desk()
    desk.draw(4)
    part = [ask(seed) for seed in range(3)]
    for most, expected in ((None, 4), (4, 4), (3, 3)):
        with desk.compiling.running(part, most) as rows:
            assert rows == expected


def test_stopped_while_drawing():
    """A run that is stopped within a batch loses nothing of what was compiled."""
    desk = Desk()
    desk.draw(4)
    with pytest.raises(Stopped), desk.compiling.running([ask()] * 4, None):
        raise Stopped(15)
    desk.draw(4)
    assert (desk.rehearsed, desk.compiling.recompilations) == ([4], 0)


def test_device_fails():
    """A device that fails while it warms up has failed the run."""
    desk = Desk()

    def rehearse(_part):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    desk.rehearse = rehearse
    with pytest.raises(DeviceFailed, match="illegal memory access"):
        desk.draw(4)


def test_compiled_again_is_counted(caplog):
    """What is compiled while pictures are drawn is counted and told."""
    desk = Desk()
    desk.draw(4)
    with suppress_warnings(), desk.compiling.running([ask()] * 4, None):
        desk.denoiser(torch.zeros(4, 1, 2))
    assert desk.compiling.recompilations == 1
    assert "recompiled" in caplog.text
