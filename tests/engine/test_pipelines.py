"""Pipelines beyond the first families: which are run, and that what is asked for is what is drawn."""

from __future__ import annotations

import dataclasses
import inspect

import diffusers
import numpy as np
import pytest
import torch

from tests.engine.conftest import ask, draw, edit, look, pipe_of
from text2img.engine.devices import suppress_warnings
from text2img.engine.inspection import check_fits, fit
from text2img.engine.pipelines import CALLS, call_of, defaults_of
from text2img.errors import ErrorCode, ModelUnusable, PromptFailed
from text2img.prompts import RequestedParameters
from text2img.prompts.parameters import ASPECT_RATIOS, resolve_parameters

MODERN = ["qwen", "z-image", "sana", "sana sprint", "klein", "klein distilled"]
LCM = {"scheduler": {"_class_name": "LCMScheduler"}}
GUIDED = ["qwen", "z-image", "sana", "sana sprint", "klein"]


def called(engine, *requests):
    """The images of the requests, and the arguments of the pipeline's calls."""
    calls, pipe = [], pipe_of(engine)
    call = type(pipe).__call__

    def spied(self, *arguments, **named):
        assert not arguments
        calls.append(copy_lists(named))
        return call(self, **named)

    signature = inspect.signature(call)
    spied.__signature__ = signature
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe), "__call__", spied)
        return draw(engine, *requests), calls


def copy_lists(named):
    """The arguments as they are passed: some pipelines write into the lists."""
    return {name: list(value) if isinstance(value, list) else value for name, value in named.items()}


def owned(request, **own):
    """The request, with parameters that its prompt itself asks for."""
    prompt = dataclasses.replace(request.prompt, requested=RequestedParameters(**own))
    parameters = dataclasses.replace(request.parameters, **own)
    return dataclasses.replace(request, prompt=prompt, parameters=parameters)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_the_table_is_true(name):
    """Steps, guidance and arguments of the table are those of the installed pipeline's call."""
    with suppress_warnings():
        pipeline = getattr(diffusers, name, None)
    parameters = {} if pipeline is None else inspect.signature(pipeline.__call__).parameters
    call = CALLS[name]
    if "num_inference_steps" not in parameters:
        pytest.skip(f"{name} needs a library that is not installed")
    named = {"prompt", "width", "height", "num_inference_steps", "generator", "output_type"}
    assert named | set(call.arguments) <= set(parameters)
    assert parameters["num_inference_steps"].default == call.steps
    if call.guidance is None:
        assert not isinstance(getattr(parameters.get("guidance_scale"), "default", None), int | float)
    elif name != "Ideogram4Pipeline":  # its own is a schedule, of 7 but for the last steps
        assert parameters[call.guidance_name].default == call.guidance
    takes_negative = "negative_prompt" in parameters
    assert takes_negative or call.negative_above is None
    if call.size is not None and isinstance(parameters["width"].default, int):
        assert call.size == (parameters["width"].default, parameters["height"].default)


def test_every_text_to_image_pipeline_of_diffusers_is_decided():
    """Each class of diffusers' own text-to-image map is run, or is refused by what it is."""
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    for name in sorted({pipeline.__name__ for pipeline in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}):
        if name not in CALLS:
            with pytest.raises(ModelUnusable, match=r"beside the text|videos"):
                call_of(name)


def test_a_pipeline_in_no_table():
    """A class that only diffusers knows is looked up there: defaults and guidance are its call's own."""
    call = call_of("AltDiffusionPipeline")
    assert (call.steps, call.guidance, call.guidance_name, call.negative_above) == (
        50,
        7.5,
        "guidance_scale",
        1.0,
    )


DOCUMENTED = {
    "qwen": {"true_cfg_scale": 4.0, "negative_prompt": " "},
    "z-image": {"guidance_scale": 4.0},
    "sana": {"guidance_scale": 4.0, "use_resolution_binning": False},
    "klein": {"guidance_scale": 4.0},
    "klein distilled": {"guidance_scale": 1.0},
}
"""How diffusers' documentation calls each, with a guidance of 4."""


@pytest.mark.parametrize("family", DOCUMENTED)
@pytest.mark.parametrize("negative", ["", "dogs"])
def test_same_as_the_documented_call(loaded, family, negative):
    """The pixels are, bit for bit, those of the call that the pipeline's documentation shows."""
    engine = loaded(family)
    size = {"width": 96, "height": 64}
    (ours,) = draw(engine, ask(seed=5, guidance_scale=4.0, negative_prompt=negative, **size))
    more = DOCUMENTED[family] | ({"negative_prompt": negative} if negative and family != "klein" else {})
    if family.startswith("klein"):
        more.pop("negative_prompt", None)
    with suppress_warnings():
        theirs = pipe_of(engine)(
            prompt="a cat",
            num_inference_steps=2,
            generator=torch.Generator("cpu").manual_seed(5),
            **size,
            **more,
        )
    assert np.array_equal(ours.pixels, np.asarray(theirs.images[0]))


@pytest.mark.parametrize("family", GUIDED)
def test_guidance_changes_the_image(loaded, family):
    """Another guidance is another image."""
    low, high = (draw(loaded(family), ask(guidance_scale=scale))[0] for scale in (3.0, 9.0))
    assert (low.pixels != high.pixels).any()


@pytest.mark.parametrize("family", MODERN)
def test_the_record_is_the_call(loaded, family):
    """What a request says after its preparation is what the call gets, and nothing else."""
    engine = loaded(family)
    request = engine.prepare(ask(guidance_scale=3.5, negative_prompt="dogs"))
    _, (call,) = called(engine, request)
    used, table = request.parameters, CALLS[type(pipe_of(engine)).__name__]
    assert (call["num_inference_steps"], call["width"], call["height"]) == (2, 64, 64)
    guidance = {name: call[name] for name in ("guidance_scale", "true_cfg_scale") if name in call}
    assert guidance == ({table.guidance_name: used.guidance_scale} if used.guidance_scale else {})
    assert call.get("negative_prompt", [""]) == [used.negative_prompt]
    assert used.recorded["guidance_scale"] == (None if family == "klein distilled" else 3.5)


@pytest.mark.parametrize("family", ["sana sprint", "klein", "klein distilled", "flux"])
def test_a_negative_prompt_without_effect(loaded, family):
    """A prompt's own is refused; the run's is left out, recorded as empty, and counted."""
    engine = loaded(family)
    with pytest.raises(PromptFailed, match=r"negative_prompt has no effect with(out)? ") as refused:
        engine.prepare(owned(ask(), negative_prompt="dogs"))
    assert refused.value.code is ErrorCode.INVALID_PARAMETERS
    prepared = engine.prepare(ask(negative_prompt="dogs"))
    assert (prepared.parameters.negative_prompt, prepared.negative_left_out) == ("", True)
    assert not engine.prepare(ask()).negative_left_out


@pytest.mark.parametrize(("family", "guidance"), [("qwen", 1.0), ("sd1", 1.0), ("z-image", 0.0)])
def test_a_negative_prompt_without_guidance(loaded, family, guidance):
    """Without guidance a negative prompt does nothing either."""
    engine = loaded(family)
    with pytest.raises(PromptFailed, match="it needs more than"):
        engine.prepare(owned(ask(guidance_scale=guidance), negative_prompt="dogs"))
    assert engine.prepare(ask(guidance_scale=guidance, negative_prompt="dogs")).negative_left_out


def test_true_cfg(loaded):
    """Flux's second guidance is passed as its own; with it above 1 a negative prompt takes effect."""
    engine = loaded("flux")
    requests = [ask(true_cfg_scale=3.0, negative_prompt=text) for text in ("dogs", "zebras")]
    (one,), (call,) = called(engine, requests[0])
    assert (call["true_cfg_scale"], call["guidance_scale"]) == (3.0, 5.0)
    (other,), (plain,) = draw(engine, requests[1]), draw(engine, ask())
    assert (one.pixels != other.pixels).any()
    assert (one.pixels != plain.pixels).any()
    with suppress_warnings():
        theirs = pipe_of(engine)(
            prompt="a cat",
            negative_prompt="dogs",
            true_cfg_scale=3.0,
            guidance_scale=5.0,
            num_inference_steps=2,
            width=64,
            height=64,
            max_sequence_length=512,
            generator=torch.Generator("cpu").manual_seed(0),
        )
    assert np.array_equal(one.pixels, np.asarray(theirs.images[0]))
    prepared = engine.prepare(owned(ask(), true_cfg_scale=3.0, negative_prompt="dogs")).parameters
    assert (prepared.negative_prompt, prepared.recorded["true_cfg_scale"]) == ("dogs", 3.0)
    with pytest.raises(PromptFailed, match="without a true_cfg_scale above 1"):
        engine.prepare(owned(ask(true_cfg_scale=1.0), negative_prompt="dogs"))
    with pytest.raises(PromptFailed, match="true_cfg_scale is not a parameter of this model"):
        loaded("sd1").prepare(owned(ask(), true_cfg_scale=3.0))
    assert loaded("sd1").prepare(ask(true_cfg_scale=3.0)).parameters.true_cfg_scale is None


def test_guidance_without_effect(loaded):
    """A prompt's own guidance is refused where the model takes none; 1 and 0 ask for none, and pass."""
    engine = loaded("klein distilled")
    with pytest.raises(PromptFailed, match="guidance_scale has no effect"):
        engine.prepare(owned(ask(), guidance_scale=4.0))
    for scale in (0.0, 1.0):
        assert engine.prepare(owned(ask(), guidance_scale=scale)).parameters.guidance_scale is None


@pytest.mark.parametrize("family", ["flux", "sd1", "sd3", *MODERN])
@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
def test_each_aspect_ratio_gives_a_size_that_is_drawn(tiny, family, ratio):
    """A size computed from an aspect ratio passes the model's own check."""
    info = dataclasses.replace(look(tiny(family)), max_side=None)
    own = RequestedParameters(
        num_inference_steps=1, guidance_scale=1, width=max(info.width, 512), height=max(info.height, 512)
    )
    wanted = resolve_parameters(
        (RequestedParameters(aspect_ratio=ratio), own), seed=0, multiple=info.multiple
    )
    check_fits(info, wanted)


@pytest.mark.parametrize("family", ["qwen", "z-image", "klein", "sana"])
def test_a_size_that_would_be_changed(loaded, family):
    """64×72 is refused with the next sizes; what passes is drawn in that size."""
    engine = loaded(family)
    with pytest.raises(PromptFailed, match=r"height must be a multiple of (16|32) with this model; it is 72"):
        engine.prepare(ask(height=72))
    (image,) = draw(engine, ask(height=96))
    assert image.pixels.shape == (96, 64, 3)


def test_a_pipeline_that_draws_another_size(loaded, monkeypatch):
    """An image of another size than the one asked for is never given out as it."""
    engine = loaded("sana")
    pipe = type(pipe_of(engine))
    call = pipe.__call__
    monkeypatch.setattr(pipe, "__call__", lambda self, **named: call(self, **named | {"width": 64}))
    (failed,) = draw(engine, ask(width=96))
    assert isinstance(failed, PromptFailed)
    assert "this model draws 64×64" in str(failed)


@pytest.mark.parametrize(
    ("name", "pipeline", "flags", "configs", "expected"),
    [
        ("x/y", "StableDiffusionXLPipeline", {}, {}, (50, 5.0, "pipeline")),
        ("x/y", "StableDiffusionPipeline", {}, {}, (50, 7.5, "pipeline")),
        ("x/y", "FluxPipeline", {}, {"transformer": {"guidance_embeds": True}}, (28, 3.5, "pipeline")),
        ("x/y", "FluxPipeline", {}, {}, (4, None, "model")),
        ("x/y", "Flux2KleinPipeline", {"is_distilled": True}, {}, (4, None, "model")),
        ("x/y", "Krea2Pipeline", {"is_distilled": True}, {}, (8, 0.0, "model")),
        ("x/y", "StableDiffusionPipeline", {}, LCM, (4, 1.0, "model")),
        ("Tongyi-MAI/Z-Image-Turbo", "ZImagePipeline", {}, {}, (8, 0.0, "model")),
        ("/models/Tongyi-MAI/Z-Image-Turbo/", "ZImagePipeline", {}, {}, (8, 0.0, "model")),
        ("stabilityai/sdxl-turbo", "StableDiffusionXLPipeline", {}, {}, (1, 0.0, "model")),
        ("/models/z-image-turbo", "ZImagePipeline", {}, {}, (50, 5.0, "pipeline")),
    ],
)  # fmt: skip
def test_defaults(name, pipeline, flags, configs, expected):
    """The folder's flags come first, then the published id, then the call's own defaults."""
    found, source = defaults_of((name,), pipeline, configs, flags)
    steps, guidance, whose = expected
    assert (found.num_inference_steps, found.guidance_scale, source) == (
        steps,
        guidance,
        f"the {whose}'s own",
    )


def test_own_sizes(tiny, copy):
    """Sana's own size counts the levels of its own kind of autoencoder."""
    assert [(look(tiny(family)).width, look(tiny(family)).multiple) for family in MODERN] == [
        (1024, 16), (1024, 16), (1024, 32), (1024, 32), (1024, 16), (1024, 16),
    ]  # fmt: skip
    folder = copy("sana")
    edit(folder / "transformer" / "config.json", sample_size=16)
    assert look(folder).width == 512


def test_areas(tiny):
    """A pipeline that scales every size to one area draws only sizes of that area."""
    info = dataclasses.replace(look(tiny("klein")), fixed_area=True)
    with pytest.raises(PromptFailed, match=r"about 1024×1024 pixels .* use 1024×1024"):
        fit(info, ask(width=512, height=512))
    fit(info, ask(width=1360, height=768))


def test_listed_sizes(tiny):
    """A pipeline that draws some sizes only refuses the others with the list."""
    info = dataclasses.replace(look(tiny("klein")), sizes=((1024, 1024), (1280, 768)))
    with pytest.raises(PromptFailed, match="must be one of 1024×1024, 1280×768"):
        fit(info, ask(width=512, height=512))
    fit(info, ask(width=1280, height=768))


@pytest.mark.parametrize("family", MODERN)
def test_alone_and_in_a_batch(loaded, family):
    """An image in a batch is the one of its prompt alone, up to a level, with its own negative prompt."""
    engine = loaded(family)
    requests = [ask(seed, f"cat {seed}", negative_prompt="x" * (seed % 2)) for seed in range(3)]
    together = draw(engine, *requests)
    for request, image in zip(requests, together, strict=True):
        (alone,) = draw(engine, request)
        assert np.abs(alone.pixels.astype(int) - image.pixels.astype(int)).max() <= 1
