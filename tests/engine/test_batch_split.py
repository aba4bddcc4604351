"""What becomes of a batch that does not fit, or in which something is broken."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.engine.conftest import ask, draw, pipe_of
from text2img.errors import DeviceFailed, ErrorCode, PromptFailed, Stopped


@contextlib.contextmanager
def planted(engine, fault):
    """Call ``fault`` with the number of requests in each forward pass of the UNet (guidance doubles them)."""
    sizes = []

    def before(_module, args, _kwargs):
        sizes.append(len(args[0]) // 2)
        fault(len(args[0]) // 2)

    hook = pipe_of(engine).unet.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield sizes
    finally:
        hook.remove()


def full_above(most, error=None):
    def fault(size):
        if size > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return fault


@pytest.fixture
def engine(loaded):
    """The shared engine, with no memory of what did not fit, before and after the test."""
    engine = loaded("sd1")
    engine._loaded.splitter._max_sizes.clear()
    yield engine
    engine._loaded.splitter._max_sizes.clear()


@pytest.mark.parametrize(
    "error",
    [
        None,
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_halved(engine, error):
    """A batch that does not fit is halved until it does, with the same pictures as before, seed by seed."""
    requests = [ask(seed) for seed in range(5)]
    before = draw(engine, *requests)
    with planted(engine, full_above(2, error)) as sizes:
        after = draw(engine, *requests)
    assert (sizes[0], max(sizes[1:])) == (5, 2)
    for one, other in zip(before, after, strict=True):
        assert abs(one.pixels.astype(int) - other.pixels.astype(int)).max() <= 1


def test_what_fits_is_remembered(engine):
    """Once halved, requests of the same size start with what fits; others with a whole batch."""
    with planted(engine, full_above(2)) as sizes:
        draw(engine, *(ask(seed) for seed in range(4)))
        del sizes[:]
        draw(engine, *(ask(seed) for seed in range(4)))
        assert set(sizes) == {2}
        draw(engine, *(ask(seed, height=128) for seed in range(4)))
        del sizes[:]
        draw(engine, *(ask(seed) for seed in range(4)))
        assert set(sizes) == {2}
    with planted(engine, lambda _size: None) as sizes:
        draw(engine, *(ask(seed, height=96) for seed in range(4)))
        assert set(sizes) == {4}


def test_never_fits(engine):
    """What does not fit even alone fails as out of memory, and the engine goes on."""
    with planted(engine, full_above(0)):
        results = draw(engine, ask(0), ask(1))
    assert [result.code for result in results] == [ErrorCode.OUT_OF_MEMORY] * 2
    assert "64×64" in str(results[0])
    assert draw(engine, ask(0))[0].pixels.shape == (64, 64, 3)


def test_only_the_culprit_fails(engine):
    """Of a batch that fails, each is drawn alone, and only the one that fails again has failed."""
    pipe = pipe_of(engine)
    poison = pipe.prepare_latents
    culprit = torch.Generator("cpu").manual_seed(2).get_state()

    def prepared(*args, **kwargs):
        for generator in args[6]:
            if torch.equal(generator.get_state(), culprit):
                raise ValueError("poisoned\nprompt")
        return poison(*args, **kwargs)

    pipe.prepare_latents = prepared
    try:
        results = draw(engine, *(ask(seed) for seed in range(4)))
    finally:
        del pipe.prepare_latents
    assert [isinstance(result, PromptFailed) for result in results] == [False, False, True, False]
    assert results[2].code is ErrorCode.GENERATION_FAILED
    assert str(results[2]) == "the model failed on this prompt: ValueError: poisoned prompt"


@pytest.mark.parametrize(
    "message",
    ["CUDA error: device-side assert triggered", "CUDA error: an illegal memory access was encountered"],
)
def test_device_failed(engine, message):
    """A device that has stopped working ends the run, not the prompt; one line says so."""

    def fault(_size):
        raise RuntimeError(f"{message}\nCompile with `TORCH_USE_CUDA_DSA`")

    with planted(engine, fault) as sizes, pytest.raises(DeviceFailed, match="CUDA error") as caught:
        draw(engine, ask(0), ask(1))
    assert len(sizes) == 1
    assert "\n" not in str(caught.value)


def test_accelerator_error(engine):
    """The class of torch's own for a broken device is known whatever it says."""

    def fault(_size):
        raise torch.AcceleratorError("unspecified launch failure", 719)

    with planted(engine, fault), pytest.raises(DeviceFailed):
        draw(engine, ask())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped(15), ValueError("mine"), MemoryError()])
def test_listener_raises(engine, error):
    """What on_step raises ends the call at once, whatever it is, and the engine stays usable."""
    told = []

    def on_step(done, _of):
        told.append(done)
        raise error

    with pytest.raises(type(error)) as caught:
        draw(engine, ask(0), ask(1), on_step=on_step)
    assert caught.value is error
    assert len(told) == 1
    assert draw(engine, ask(0))[0].pixels.shape == (64, 64, 3)


def test_steps_of_a_halved_batch(engine):
    """Steps are told as those of the whole batch, forwards, also when it is drawn in parts."""
    told = []
    with planted(engine, full_above(2)):
        requests = [ask(seed, num_inference_steps=4, scheduler="ddim") for seed in range(5)]
        draw(engine, *requests, on_step=lambda done, of: told.append((done, of)))
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert (done[0], done[-1], {of for _, of in told}) == (0, 4, {4})


def test_steps_never_go_back(engine):
    """A batch that fails half-way and starts again never tells fewer steps than before."""
    told, passes = [], []

    def fault(size):
        passes.append(size)
        if len(passes) == 4:
            raise torch.OutOfMemoryError("full")

    with planted(engine, fault):
        requests = [ask(seed, num_inference_steps=5, scheduler="ddim") for seed in range(4)]
        draw(engine, *requests, on_step=lambda done, _of: told.append(done))
    assert told[:3] == [1, 2, 3]
    assert told == sorted(told)
    assert told[-1] == 5


def test_nothing_is_kept_of_a_failed_try(engine):
    """Before a batch is tried again, the tensors of the failed try are gone."""
    import weakref

    kept = []

    def fault(size):
        if size > 1:
            tensor = torch.zeros(9)
            kept.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("full")
        assert [ref() for ref in kept] == [None] * len(kept)

    with planted(engine, fault):
        results = draw(engine, ask(0), ask(1))
    assert kept
    assert all(not isinstance(result, PromptFailed) for result in results)
