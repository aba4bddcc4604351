"""The engine on a CUDA device, with tiny models built in code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.engine.conftest import ask, draw, open_engine, pipe_of
from text2img.engine.denoiser import Decoder, to_pixels
from text2img.engine.model_folder import FAMILIES as FAMILY
from text2img.errors import ErrorCode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FAMILIES = ["sd1", "sdxl", "sd3", "flux"]


@pytest.mark.parametrize("family", FAMILIES)
def test_fp16_by_itself(folder, family):
    """On a GPU auto is fp16, and each family draws."""
    engine = open_engine(folder(family), device="auto")
    pipe = pipe_of(engine)
    assert (pipe.vae.dtype, pipe.device.type) == (torch.float16, "cuda")
    for image in draw(engine, *(ask(seed) for seed in range(3))):
        assert image.pixels.std() > 1


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


@pytest.mark.parametrize(("dtype", "tf32"), [("fp16", True), ("bf16", True), ("fp32", False)])
def test_fp32_is_fp32(folder, dtype, tf32):
    """Whoever asks for fp32 gets convolutions in fp32, and products of matrices in any case."""
    open_engine(folder("sd1"), device="cuda", dtype=dtype)
    assert torch.backends.cudnn.allow_tf32 is tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_on_the_device(folder, family, dtype):
    """All weights are on the device and in the dtype, without hooks that would move them to and fro."""
    pipe = pipe_of(open_engine(folder(family), device="cuda", dtype=dtype))
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert modules
    assert {weight.device.type for module in modules for weight in module.parameters()} == {"cuda"}
    assert not any(hasattr(module, "_hf_hook") for module in modules)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_kernel(folder, family):
    """Denoiser and VAE find a fused kernel for their attention: with the one by hand forbidden they draw."""
    engine = open_engine(folder(family), device="cuda", dtype="fp16")
    pipe = pipe_of(engine)
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    for module in (getattr(pipe, "unet", None) or pipe.transformer, pipe.vae.decoder):
        forward = module.forward

        def forbidding(*args, forward=forward, **kwargs):
            with sdpa_kernel(fused):
                return forward(*args, **kwargs)

        module.forward = forbidding
    assert all(image.pixels.std() > 1 for image in draw(engine, ask(0), ask(1)))


def copies_to_the_host(work) -> list[int]:
    """The bytes of each copy from the device to the host that ``work`` makes."""
    work()  # what is made once is there
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if "Memcpy DtoH" in event.name()]


@pytest.mark.parametrize("pictures", [1, 5])
def test_one_copy(folder, pictures):
    """Pictures leave the device as bytes, a batch in one copy, after one copy of a flag or two for each."""
    pipe = pipe_of(open_engine(folder("sd1"), device="cuda", dtype="fp16"))
    decoder = Decoder(pipe, FAMILY["StableDiffusionPipeline"])
    latents = torch.zeros(pictures, 4, 8, 8, dtype=torch.float16, device="cuda")
    sizes = copies_to_the_host(lambda: decoder.decode(latents, (64, 64)))
    assert len(sizes) == 2
    assert max(sizes) in (0, pictures * 3 * 64 * 64)  # 0 where the profiler counts no bytes


def test_rounding(folder):
    """Values are rounded on the device as diffusers rounds them on the host."""
    pipe = pipe_of(open_engine(folder("sd1"), device="cuda", dtype="fp16"))
    decoded = torch.linspace(-1.2, 1.2, 3 * 64 * 64, device="cuda").view(3, 64, 64).half()
    (theirs,) = pipe.image_processor.postprocess(decoded[None], output_type="pil")
    assert np.array_equal(to_pixels(decoded).cpu().numpy(), np.asarray(theirs))


def test_again(folder):
    """The same batch twice is the same, bit by bit."""
    engine = open_engine(folder("sd1"), device="cuda", dtype="fp16")
    once, twice = (draw(engine, ask(1), ask(2)) for _ in range(2))
    assert all(np.array_equal(one.pixels, other.pixels) for one, other in zip(once, twice, strict=True))
