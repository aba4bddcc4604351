"""Latents to pixels: rounding, precision, what is not finite, and the safety checker."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.conftest import ask, draw, open_engine, pipe_of
from text2img.engine.denoiser import Decoder, to_pixels
from text2img.engine.devices import suppress_warnings
from text2img.engine.model_folder import FAMILIES, OTHER
from text2img.engine.pipelines import DecodedImages
from text2img.errors import ErrorCode


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding(loaded, dtype):
    """Every value is rounded as diffusers rounds it."""
    decoded = (torch.linspace(-1.2, 1.2, 3 * 64 * 64).view(1, 3, 64, 64)).to(dtype)
    theirs = pipe_of(loaded("sd1")).image_processor.postprocess(decoded, output_type="pil")[0]
    assert np.array_equal(to_pixels(decoded[0]).numpy(), np.asarray(theirs))


@pytest.fixture
def hooked():
    """Changes a module's output by a function, until the test ends."""
    hooks = []

    def hook(module, change):
        hooks.append(module.register_forward_hook(lambda _module, _args, output: change(output)))

    yield hook
    for one in hooks:
        one.remove()


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_not_finite(loaded, hooked, family, value):
    """A prompt whose latents are not finite fails; its neighbours' pictures are as ever."""
    engine = loaded(family)
    pipe = pipe_of(engine)
    before = draw(engine, *(ask(seed) for seed in range(3)))

    def spoil(output):
        spoilt = output[0].clone()
        spoilt[1::3] = value  # guidance doubles the three rows
        return (spoilt, *output[1:])

    hooked(getattr(pipe, "unet", None) or pipe.transformer, spoil)
    after = draw(engine, *(ask(seed) for seed in range(3)))
    assert after[1].code is ErrorCode.NOT_FINITE
    assert "the model's latents" in str(after[1])  # known before it is decoded
    for seed in (0, 2):
        assert np.array_equal(before[seed].pixels, after[seed].pixels)


def overflowing(vae):
    """Only fp16 overflows, as the real thing does."""
    return lambda output: output * float("inf") if vae.dtype == torch.float16 else output


def test_decoded_again_in_fp32(tiny, hooked):
    """A decode that overflows in fp16 is done again in fp32, and the VAE is in fp16 again afterwards."""
    engine = open_engine(tiny("sd1"), dtype="fp16")
    (expected,) = draw(engine, ask())
    vae = pipe_of(engine).vae
    weights = vae.decoder.conv_in.weight.clone()
    hooked(vae.decoder, overflowing(vae))
    (image,) = draw(engine, ask())
    assert np.abs(image.pixels.astype(int) - expected.pixels.astype(int)).max() <= 3
    assert vae.dtype == torch.float16
    assert torch.equal(vae.decoder.conv_in.weight, weights)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_never_finite(tiny, hooked, dtype):
    """What is not finite in fp32 either fails its prompt, with a sentence, and is no black picture."""
    engine = open_engine(tiny("sd1"), dtype=dtype)
    hooked(pipe_of(engine).vae.decoder, lambda output: output * float("nan"))
    results = draw(engine, ask(0), ask(1))
    assert [result.code for result in results] == [ErrorCode.NOT_FINITE] * 2


@pytest.mark.parametrize(("family", "expected"), [("sdxl", torch.float32), ("sd1", torch.float16)])
def test_force_upcast(tiny, hooked, family, expected):
    """XL's VAE decodes in fp32 where its configuration says so; SD 1's says so too and is not meant."""
    engine = open_engine(tiny(family), dtype="fp16")
    vae, seen = pipe_of(engine).vae, []
    hooked(vae.decoder, lambda output: seen.append(output.dtype))
    draw(engine, ask())
    assert vae.config.force_upcast
    assert (seen, vae.dtype) == ([expected], torch.float16)


def test_picture_by_picture(loaded, hooked):
    """The VAE sees one picture at a time, whatever the batch."""
    engine, seen = loaded("sd1"), []
    hooked(pipe_of(engine).vae.decoder, lambda output: seen.append(len(output)))
    draw(engine, *(ask(seed) for seed in range(3)))
    assert seen == [1, 1, 1]


def test_decoded_alone_or_not(loaded):
    """Latents become the same pixels, bit by bit, whatever is decoded beside them."""
    pipe = pipe_of(loaded("sd1"))
    decoder = Decoder(pipe, FAMILIES["StableDiffusionPipeline"])
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    together = decoder.decode(latents, (64, 64))
    for one, beside in zip(latents, together, strict=True):
        (alone,) = decoder.decode(one[None], (64, 64))
        assert np.array_equal(alone, beside)


class Waits(TorchDispatchMode):
    """Counts the reads of single values, each of which would make the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_waits_do_not_grow(loaded):
    """Nothing is read from the device picture by picture: flags and pixels come in one copy each."""
    decoder = Decoder(pipe_of(loaded("sd1")), FAMILIES["StableDiffusionPipeline"])
    for pictures in (1, 5):
        with Waits() as waits:
            decoder.decode(torch.zeros(pictures, 4, 8, 8), (64, 64))
        assert waits.count == 0


def test_normalised_latents(loaded, monkeypatch):
    """XL models that record their latents' mean and deviation are decoded with them, as diffusers does."""
    engine = loaded("sdxl")
    vae = pipe_of(engine).vae
    config = {"latents_mean": [0.5, 1, 0, 0], "latents_std": [2.0, 1, 1, 1]}
    monkeypatch.setattr(vae, "_internal_dict", type(vae.config)({**vae.config, **config}))
    (ours,) = draw(engine, ask())
    with suppress_warnings():
        theirs = pipe_of(engine)(
            ["a cat"],
            num_inference_steps=2,
            guidance_scale=5.0,
            width=64,
            height=64,
            generator=[torch.Generator("cpu").manual_seed(0)],
        )
    assert np.array_equal(ours.pixels, np.asarray(theirs.images[0]))


def test_other_pipelines(loaded):
    """A pipeline of no known family decodes for itself; what it gives is looked at all the same."""
    decoder = Decoder(pipe_of(loaded("sd3")), OTHER)
    assert decoder.output_type == "np"
    images = np.random.default_rng(0).random((4, 8, 16, 3), dtype=np.float32)
    images[1, 0, 0, 0] = np.nan
    output = SimpleNamespace(images=images, nsfw_content_detected=[False, False, True, False])
    decoded = decoder.decode(DecodedImages.of(output, 3), (16, 8))
    assert len(decoded) == 3
    assert np.array_equal(decoded[0], (images[0] * 255).round().astype(np.uint8))
    assert [failed.code for failed in decoded[1:]] == [ErrorCode.NOT_FINITE, ErrorCode.SAFETY]
    (failed,) = decoder.decode(DecodedImages.of(output, 1), (16, 16))
    assert failed.code is ErrorCode.INVALID_PARAMETERS


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """An engine whose model has a safety checker, which flags nothing yet."""
    from tests.engine import models

    folder = tmp_path_factory.mktemp("checked")
    with suppress_warnings():
        models.sd1(checked=True).save_pretrained(folder)
    return open_engine(folder)


def test_checker_flags(checked):
    """A picture that the safety checker flags fails as such; its neighbours are drawn; no black picture."""
    checker = pipe_of(checked).safety_checker
    assert draw(checked, ask())[0].pixels.std() > 1
    flags = iter([False, True, False])
    real = checker.forward
    checker.forward = lambda images, clip_input: (images, [next(flags)])
    try:
        results = draw(checked, *(ask(seed) for seed in range(3)))
    finally:
        checker.forward = real
    assert results[1].code is ErrorCode.SAFETY
    assert [results[0].pixels.std() > 1, results[2].pixels.std() > 1] == [True, True]


def test_checker_really_looks(checked):
    """The checker's own weights decide: with its thresholds at the bottom it flags everything."""
    checker = pipe_of(checked).safety_checker
    kept = checker.concept_embeds_weights.data.clone()
    checker.concept_embeds_weights.data.fill_(-2.0)
    try:
        results = draw(checked, ask(0), ask(1))
    finally:
        checker.concept_embeds_weights.data.copy_(kept)
    assert [result.code for result in results] == [ErrorCode.SAFETY] * 2
