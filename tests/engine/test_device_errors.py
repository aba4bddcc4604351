"""What an error of the device means: for the prompts, for the run, and for the batches that follow."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.conftest import ask, draw, open_engine, pipe_of
from tests.painter import Bench
from text2img.databases import Selection
from text2img.errors import DeviceFailed, ErrorCode, PromptFailed, Stopped

NO_ENGINE = "GET was unable to find an engine to execute this computation"
UNKNOWN = "something that no release has said before"
MEMORY = [
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp:1016, please report a bug",
    "Triton Error [CUDA]: out of memory",
    "Invalid buffer size: 24.00 GiB",
]
UNCLEAR = [
    NO_ENGINE,
    "FIND was unable to find an engine to execute this computation",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "CUDA error: invalid configuration argument",
    UNKNOWN,
]
BROKEN = [
    "Triton Error [CUDA]: an illegal memory access was encountered",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(…)`",
    "CUDA driver error: an illegal memory access was encountered",
]


@pytest.fixture
def engine(tiny):
    """An engine that has generated nothing yet."""
    return open_engine(tiny("sd1"))


@pytest.fixture
def bench(tmp_path):
    """A database with six prompts, and a worker that runs batches of four."""
    made = Bench(tmp_path, 6)
    yield made
    made.database.close()


@contextlib.contextmanager
def planted(module, fault):
    """Call ``fault`` with the input of each forward pass of the module; yield the sizes of these inputs."""
    sizes = []

    def before(_module, args, kwargs):
        values = args[0] if args else kwargs["hidden_states"]
        sizes.append(len(values))
        fault(values)

    hook = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield sizes
    finally:
        hook.remove()


def above(size, message):
    """Return a fault of the UNet in calls with more than ``size`` rows: with guidance, two an image."""

    def fault(values):
        if len(values) > size:
            raise RuntimeError(message)

    return fault


def error_codes(bench):
    return bench.database.runs.counts(Selection()).errors


def made(results):
    return [not isinstance(result, PromptFailed) for result in results]


@pytest.mark.parametrize("message", MEMORY)
def test_memory(engine, bench, message):
    """What says that memory was short ends as the prompts' own, where they do not fit even alone."""
    with planted(pipe_of(engine).unet, above(0, message)):
        bench.work(engine)
    assert error_codes(bench) == {"out_of_memory": 6}


@pytest.mark.parametrize("message", [*UNCLEAR, *BROKEN])
def test_nothing_can_be_drawn(engine, bench, message):
    """Where every image fails, also the engine's own, the run ends with that error and blames no prompt."""
    with planted(pipe_of(engine).unet, above(0, message)), pytest.raises(DeviceFailed) as caught:
        bench.work(engine)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert bench.counts == (6, 0, 0, 0)
    prompts = bench.database.queue.claim("w2", 6, 60, Selection())
    assert [(prompt.attempts, prompt.deaths) for prompt in prompts] == [(0, 0)] * 6


@pytest.mark.parametrize("message", BROKEN)
def test_broken_at_once(engine, message):
    """What says that the device has failed ends the run at the first batch."""
    with planted(pipe_of(engine).unet, above(0, message)) as sizes, pytest.raises(DeviceFailed):
        draw(engine, *(ask(seed) for seed in range(4)))
    assert sizes == [8]


@pytest.mark.parametrize("message", [*MEMORY, *UNCLEAR])
def test_size_is_remembered(engine, bench, message):
    """A batch that fails for its size alone is halved, and later batches begin with what runs."""
    with planted(pipe_of(engine).unet, above(1, message)) as sizes:
        bench.work(engine)
    assert bench.counts == (0, 0, 6, 0)
    assert sizes[:2] == [4, 2]
    assert set(sizes[2:]) == {1}


def test_size_between(engine):
    """The largest size that runs is kept: of five, two at once."""
    requests = [ask(seed) for seed in range(5)]
    with planted(pipe_of(engine).unet, above(4, UNKNOWN)) as sizes:
        assert all(made(draw(engine, *requests)))
        del sizes[:]
        assert all(made(draw(engine, *requests)))
    assert {size // 2 for size in sizes} == {1, 2}


@pytest.fixture
def short_memory(monkeypatch):
    """A CUDA device of 24 GiB with 100 MiB to spare."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (100 * 2**20, 24 * 2**30))


@pytest.mark.parametrize("message", UNCLEAR[:5])
def test_unclear_in_short_memory(engine, bench, short_memory, message):
    """Where memory is short, an error that may be the memory's is the memory's."""
    with planted(pipe_of(engine).unet, above(0, message)):
        bench.work(engine)
    assert error_codes(bench) == {"out_of_memory": 6}


def test_wrapped_error(engine):
    """A library's own exception is what its cause is."""

    def fault(values):
        if len(values) > 4:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            except RuntimeError as exc:
                raise ValueError("the block failed") from exc

    with planted(pipe_of(engine).unet, fault) as sizes:
        assert all(made(draw(engine, *(ask(seed) for seed in range(4)))))
    assert sizes[0] == 8
    assert set(sizes[1:]) == {4}


def poison(engine, monkeypatch, seeds):
    """Make the model fail for these seeds, whatever is drawn beside them."""
    pipe = pipe_of(engine)
    states = [torch.Generator("cpu").manual_seed(seed).get_state() for seed in seeds]
    prepare = pipe.prepare_latents

    def prepared(*args, **kwargs):
        for generator in args[6]:
            if any(torch.equal(generator.get_state(), state) for state in states):
                raise ValueError(UNKNOWN)
        return prepare(*args, **kwargs)

    monkeypatch.setattr(pipe, "prepare_latents", prepared)


def test_bad_prompts(engine, monkeypatch):
    """Prompts that fail alike one after the other are to blame if the engine's own does not fail."""
    poison(engine, monkeypatch, (1, 2, 3))
    results = draw(engine, *(ask(seed) for seed in range(1, 6)))
    assert made(results) == [False, False, False, True, True]
    assert {result.code for result in results[:3]} == {ErrorCode.GENERATION_FAILED}
    assert UNKNOWN in str(results[0])
    assert engine._loaded.splitter.max_size(ask()) is None


def test_one_by_one(engine):
    """A device that fails between two batches of one ends the run; no prompt is to blame."""
    draw(engine, ask(0))
    expected = pytest.raises(DeviceFailed, match="a prompt of the engine's own fails as well")
    with planted(pipe_of(engine).unet, above(0, UNKNOWN)), expected:
        draw(engine, ask(1))


def test_short_disturbance(engine):
    """A device that works again at the engine's own prompt has not failed; the prompt may be tried again."""
    calls = []

    def fault(_values):
        calls.append(1)
        if len(calls) <= 2:
            raise RuntimeError(UNKNOWN)

    with planted(pipe_of(engine).unet, fault):
        (failed,) = draw(engine, ask(1))
        assert failed.code is ErrorCode.GENERATION_FAILED
        assert all(made(draw(engine, ask(1))))


def test_stopped_in_its_own_prompt(engine, monkeypatch):
    """The steps of the engine's own prompt are reported, so that a stop ends it."""
    poison(engine, monkeypatch, (1,))
    told = []

    def on_step(done, of):
        told.append((done, of))
        raise Stopped(15)

    with pytest.raises(Stopped):
        draw(engine, ask(1), on_step=on_step)
    assert len(told) == 1


class Dead(TorchDispatchMode):
    """A device on which, once ``dead`` is set, every operation fails."""

    dead = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.dead:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure", 719)
        return func(*args, **kwargs or {})


def test_probe_fails(engine):
    """After an unknown error a tiny kernel is tried: if it fails, the device has, at the first batch."""
    requests = [engine.prepare(ask(seed)) for seed in range(4)]
    with Dead() as device:

        def fault(_values):
            device.dead = True
            raise RuntimeError(UNKNOWN)

        with planted(pipe_of(engine).unet, fault) as sizes, pytest.raises(DeviceFailed) as caught:
            engine.generate(requests, lambda _done, _of: None)
        device.dead = False
    assert sizes == [8]
    assert UNKNOWN in str(caught.value)
    assert "unspecified launch failure" in str(caught.value)


@pytest.mark.parametrize("message", [UNKNOWN, MEMORY[0], BROKEN[0]])
def test_freeing_memory_fails(engine, monkeypatch, message):
    """Where not even cached memory can be freed, the device has failed; closing the engine does not raise."""

    def empty_cache():
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    with planted(pipe_of(engine).unet, above(0, message)), pytest.raises(DeviceFailed) as caught:
        draw(engine, ask(1), ask(2))
    assert message in str(caught.value)
    engine.close()


def test_several_do_not_decode(engine):
    """Images that do not decode together decode one by one, from the same latents, to the same pixels."""
    requests = [ask(seed) for seed in range(3)]
    expected = draw(engine, *requests)
    decoded = []

    def fault(values):
        decoded.append(len(values))
        if len(decoded) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    pipe = pipe_of(engine)
    with planted(pipe.unet, lambda _values: None) as sizes, planted(pipe.vae.decoder, fault):
        results = draw(engine, *requests)
        assert set(sizes) == {6}
        assert decoded == [1] * 6
        passes = len(sizes)
        draw(engine, *requests)
        assert (set(sizes), len(sizes)) == ({6}, 2 * passes)
        assert decoded == [1] * 9
    for one, other in zip(expected, results, strict=True):
        assert np.array_equal(one.pixels, other.pixels)


def wider_than(side, message="CUDA out of memory"):
    """Return a fault of a decoder for latents with a longer side."""

    def fault(values):
        if max(values.shape[2:]) > side:
            raise RuntimeError(message)

    return fault


@pytest.mark.parametrize(
    ("family", "size", "side"),
    [
        ("sd1", (64, 64), 4),
        ("sd1", (64, 128), 8),
        ("sdxl", (64, 64), 4),
        ("sd3", (128, 64), 4),
        ("flux", (64, 64), 4),
    ],
)
def test_tiles(tiny, family, size, side):
    """An image that does not decode whole decodes in tiles; nothing is denoised again, and later ones are
    whole where they fit.
    """
    engine = open_engine(tiny(family))
    pipe = pipe_of(engine)
    requests = [ask(seed, width=size[0], height=size[1]) for seed in range(2)]
    expected = draw(engine, *requests)
    with (
        planted(pipe.components.get("unet") or pipe.transformer, lambda _values: None) as sizes,
        planted(pipe.vae.decoder, wider_than(side)),
    ):
        tiled = draw(engine, *requests)
    assert len(set(sizes)) == 1
    for one, other in zip(expected, tiled, strict=True):
        assert other.pixels.shape == (size[1], size[0], 3)
        assert np.abs(one.pixels.astype(int) - other.pixels).mean() < 40
    for one, other in zip(expected, draw(engine, *requests), strict=True):
        assert np.array_equal(one.pixels, other.pixels)


def test_tiles_of_a_tiny_autoencoder(tiny):
    """A tiny autoencoder's overlaps are smaller, and its tiles fit together as well."""
    engine = open_engine(tiny("sd1"), autoencoder=str(tiny("tiny autoencoder")))
    (expected,) = draw(engine, ask(width=128, height=128))
    with planted(pipe_of(engine).vae.decoder, wider_than(8)):
        (tiled,) = draw(engine, ask(width=128, height=128))
    assert np.abs(expected.pixels.astype(int) - tiled.pixels).mean() < 40


@pytest.mark.parametrize("message", MEMORY)
def test_never_decodes(engine, message):
    """An image that does not decode in the smallest tiles is out of memory, after one denoising."""
    pipe = pipe_of(engine)
    with planted(pipe.unet, lambda _values: None) as sizes, planted(pipe.vae.decoder, wider_than(0, message)):
        results = draw(engine, *(ask(seed) for seed in range(4)))
    assert [result.code for result in results] == [ErrorCode.OUT_OF_MEMORY] * 4
    assert "64×64" in str(results[0])
    assert set(sizes) == {8}
    assert all(made(draw(engine, ask(0))))


def test_one_does_not_decode(engine):
    """Its neighbours are made, from the latents that are there."""
    calls = []

    def fault(_values):
        calls.append(1)
        if 2 <= len(calls) <= 6 and len(calls) != 3:  # together, then the second alone, whole and in tiles
            raise torch.OutOfMemoryError("CUDA out of memory")

    with planted(pipe_of(engine).vae.decoder, fault):
        results = draw(engine, *(ask(seed) for seed in range(3)))
    assert made(results) == [True, False, True]


@pytest.mark.parametrize("message", [NO_ENGINE, UNKNOWN])
def test_decoder_never_works(engine, bench, message):
    """A decoder that fails for an unknown cause, also on the engine's own prompt, ends the run."""
    fault = wider_than(0, message)
    with planted(pipe_of(engine).vae.decoder, fault), pytest.raises(DeviceFailed, match="engine's own"):
        bench.work(engine)
    assert bench.counts == (6, 0, 0, 0)


def test_size_is_remembered_where_the_pipeline_decodes_itself(tiny, bench):
    """A pipeline of another family decodes in its own call, all images at once: for lack of memory there the
    batch is halved, the size that fits is remembered, and every prompt gets its image.
    """
    engine = open_engine(tiny("lcm"))
    with planted(pipe_of(engine).vae.decoder, above(1, MEMORY[0])) as sizes:
        bench.work(engine)
    assert bench.counts == (0, 0, 6, 0)
    assert sizes[:2] == [4, 2]
    assert set(sizes[2:]) == {1}


def test_a_broken_device_does_not_replace_a_stop(engine, monkeypatch):
    """What fails while components are moved off the device does not hide why the batch ended."""

    def fail():
        raise RuntimeError(BROKEN[0])

    def stop(_done, _of):
        raise Stopped(15)

    monkeypatch.setattr(pipe_of(engine), "maybe_free_model_hooks", fail)
    with pytest.raises(Stopped):
        draw(engine, ask(), on_step=stop)
