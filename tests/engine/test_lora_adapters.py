"""LoRAs in the engine, on tiny models: made in code, loaded, switched, refused."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from tests.engine import loras
from tests.engine.conftest import ask, draw, open_engine, pipe_of
from text2img.engine.lora_adapters import Adapters
from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts.parameters import Lora


def styled(*files, weight=1.0, seed=0, **wanted):
    """A request for these LoRA files."""
    asked = tuple(Lora(path=file, weight=weight) for file in files)
    return replace(ask(seed, loras=asked, **wanted), lora_files=files)


def pixels(engine, request):
    (image,) = draw(engine, request)
    assert not isinstance(image, PromptFailed), image
    return image.pixels


def failure(engine, *files):
    (image,) = draw(engine, styled(*files))
    assert isinstance(image, PromptFailed)
    assert image.code is ErrorCode.LORA_FAILED
    return str(image)


@contextlib.contextmanager
def merged(engine, made, weight=1.0):
    """The engine with the halves' products added to its weights: what a LoRA means, by its definition.

    Afterwards it has the weights that it had before, bit by bit.
    """
    pipe, before = pipe_of(engine), []
    engine._loaded.denoiser._text_encoder._text_lora_key = (
        object  # a text that was read with other weights is read anew
    )
    for name, (down, up) in made.items():
        component, _, path = name.partition(".")
        module = getattr(pipe, component).get_submodule(path)
        before.append((module, module.weight.data))
        module.weight.data = module.weight.data + weight * (up @ down)
    yield engine
    for module, weights in before:
        module.weight.data = weights


@pytest.fixture(scope="module")
def engines(tiny):
    """An engine of a family, loaded once, whose adapters come and go; by the name ``twin`` another one, that
    no LoRA ever reaches.
    """

    @functools.cache
    def opened(family, _name=""):
        engine = open_engine(tiny(family))
        engine._loaded.adapters._max_adapters = 3  # switching takes the longer the more adapters are loaded
        return engine

    return opened


@pytest.fixture
def engine(engines):
    return engines("sd1")


@pytest.fixture
def fresh(tiny):
    """An engine that has seen no LoRA yet."""
    return open_engine(tiny("sd1"))


@pytest.fixture
def style(engine, tmp_path):
    """The file of a LoRA for the tiny SD 1."""
    return loras.save(tmp_path, loras.tensors(loras.halves(pipe_of(engine))))


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(
    ("family", "style"),
    [(family, style) for family in ("sd1", "sdxl") for style in loras.FORMATS]
    + [("sd3", "peft"), ("flux", "peft")],
)
def test_a_lora_is_added_to_the_weights(engines, tmp_path, family, style, text):
    """In each format, a LoRA of denoiser and text encoders draws what a model draws to whose weights its
    product was added, and not what the model draws by itself.
    """
    engine, twin = engines(family), engines(family, "twin")
    made = loras.halves(pipe_of(engine), text=text)
    if family == "flux":
        made = {name: pair for name, pair in made.items() if "text_encoder_2" not in name}
    alpha = 2 if style == "kohya" else None
    file = loras.save(tmp_path, loras.tensors(made, style, alpha))
    plain = pixels(engine, ask())
    with merged(twin, made, weight=0.5 if alpha else 1.0):
        theirs = pixels(twin, ask())
    ours = pixels(engine, styled(file))
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert np.abs(ours.astype(int) - plain).max() > 10


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_nothing_of_a_lora_is_left(engines, tmp_path, family):
    """After batches of mixed LoRAs, of text encoders too, a batch without one is bit-equal to the same batch
    on a model that no LoRA has reached; so is each LoRA's, however often they are switched.
    """
    engine, untouched = engines(family), engines(family, "twin")
    files = [
        loras.save(
            tmp_path, loras.tensors(loras.halves(pipe_of(engine), rank=rank, seed=rank, text=text)), f"{rank}"
        )
        for rank, text in ((2, False), (4, True), (8, True))
    ]
    asked = [styled(files[0]), ask(), styled(files[1], weight=-0.5), styled(*files), styled(files[2]), ask()]
    first = [pixels(engine, request) for request in asked]
    again = [pixels(engine, request) for request in reversed(asked)]
    assert np.array_equal(first, again[::-1])
    assert np.array_equal(first[1], pixels(untouched, ask()))
    assert np.array_equal(first[5], first[1])
    different = {image.tobytes() for image in first}
    assert len(different) == 5


def test_the_model_without_loras_is_the_one_that_was_loaded(fresh, style):
    """Where no LoRA is asked for, the model has the very modules that it was loaded with."""
    before = [id(module) for module in pipe_of(fresh).unet.modules()]
    pixels(fresh, styled(style))
    assert [id(module) for module in pipe_of(fresh).unet.modules()] != before
    pixels(fresh, ask())
    assert [id(module) for module in pipe_of(fresh).unet.modules()] == before


def test_adapters_stay_loaded(fresh, style, tmp_path):
    """A LoRA's file is read once; one whose content has changed is read again."""
    once = pixels(fresh, styled(style))
    held = fresh._loaded.adapters.names
    pixels(fresh, ask())
    assert np.array_equal(pixels(fresh, styled(style, weight=1.0)), once)
    assert fresh._loaded.adapters.names == held
    pixels(fresh, ask())
    loras.save(tmp_path, loras.tensors(loras.halves(pipe_of(fresh), rank=2)))
    assert not np.array_equal(pixels(fresh, styled(style)), once)
    assert len(fresh._loaded.adapters.names) == 2


def test_one_file_by_two_paths(engine, style):
    """A file that two LoRAs of a prompt lead to counts with both weights."""
    once, twice = styled(style, weight=0.75), styled(style, style)
    parameters = replace(twice.parameters, loras=(Lora("a/b", 0.5), Lora("a/b/c.safetensors", 0.25)))
    assert np.array_equal(pixels(engine, replace(twice, parameters=parameters)), pixels(engine, once))


def test_the_least_recently_used_go(fresh, tmp_path):
    """Beyond the bound the adapters go that were used longest ago, but none that a picture is asking for."""
    files = [
        loras.save(tmp_path, loras.tensors(loras.halves(pipe_of(fresh), seed=seed)), str(seed))
        for seed in range(4)
    ]
    adapters = fresh._loaded.adapters
    adapters._max_adapters = 2
    first = pixels(fresh, styled(files[0]))
    for file in files[1:3]:
        pixels(fresh, styled(file))
    assert adapters.names == ["adapter_000002", "adapter_000003"]
    pixels(fresh, styled(*files[1:]))
    assert len(adapters.names) == 3
    assert np.array_equal(pixels(fresh, styled(files[0])), first)
    assert adapters.names == ["adapter_000004", "adapter_000005"]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_weights_are_in_the_models_dtype(tiny, tmp_path, dtype):
    """An adapter's weights have the dtype and device of the modules that they are added to."""
    engine = open_engine(tiny("sd1"), dtype=dtype)
    pipe = pipe_of(engine)
    file = loras.save(tmp_path, loras.tensors(loras.halves(pipe, text=True)))
    pixels(engine, styled(file))
    for component in (pipe.unet, pipe.text_encoder):
        weights = [weight for name, weight in component.named_parameters() if "lora_" in name]
        assert {(weight.dtype, weight.device) for weight in weights} == {(component.dtype, component.device)}


def test_what_diffusers_tells_of_the_scale_is_heeded(engine, engines, tmp_path):
    """Metadata that diffusers writes into a file scale its weights: lora_alpha, patterns, rank-stabilised."""
    made = loras.halves(pipe_of(engine), rank=4)
    odd = next(iter(made)).removeprefix("unet.")
    told = {"unet.lora_alpha": 3, "unet.use_rslora": True, "unet.alpha_pattern": {odd: 1}}
    file = loras.save(tmp_path, loras.tensors(made), **told)
    expected = {name: (down, up * (0.5 if name.endswith(odd) else 1.5)) for name, (down, up) in made.items()}
    with merged(engines("sd1", "twin"), expected) as twin:
        theirs = pixels(twin, ask())
    assert np.abs(pixels(engine, styled(file)).astype(int) - theirs).max() <= 1


def _spoilt(named, how):
    key = min(named)
    first = named[key].clone()
    return {
        "nan": lambda: {**named, key: torch.full_like(first, torch.nan)},
        "infinite": lambda: {**named, key: first * torch.inf},
        "stranger": lambda: {
            **named,
            "unet.no.such.lora_A.weight": first,
            "unet.no.such.lora_B.weight": first + 1,
        },
        "half": lambda: {name: value for name, value in named.items() if name != key},
        "shape": lambda: {**named, key: first[:, :-1].contiguous()},
        "unknown": lambda: {f"elsewhere.{name}": value for name, value in named.items()},
        "dora": lambda: {**named, key.replace("lora_A.weight", "dora_scale"): first},
        "alpha": lambda: {**named, "unet.no.such.alpha": torch.tensor(1.0)},
        "no lora": lambda: {"weight": first},
        "nothing": dict,
        "one more": lambda: {**named, "unet.conv_in.weight": first},
    }[how]()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("nan", "1 of its weights hold values that are not finite, such as "),
        ("infinite", "not finite"),
        ("stranger", r"only 64 of its 66 weights belong to a module of this model; unet.no.such.lora_A"),
        ("half", "has no other half in the file"),
        ("shape", r"has the shape \(4, 15\) and the model's module is \(16, 16\)|It is for another model"),
        ("unknown", "none of its weights belongs to a module of this model"),
        ("dora", "it is a DoRA"),
        ("alpha", "unet.no.such.alpha scales a module that is not in the file"),
        ("no lora", "the LoRA cannot be used: "),
        ("nothing", "its file is empty"),
        ("one more", r"only 64 of its 65 weights belong"),
    ],
)
def test_what_is_wrong_with_a_lora_is_said(engine, tmp_path, how, says):
    """A LoRA that is broken or fits only in part is the failure of who asked for it, and of nobody else."""
    made = loras.halves(pipe_of(engine))
    plain = pixels(engine, ask())
    file = loras.save(tmp_path, _spoilt(loras.tensors(made), how))
    with pytest.raises(PromptFailed, match=says):
        raise PromptFailed(ErrorCode.LORA_FAILED, failure(engine, file))
    assert np.array_equal(pixels(engine, ask()), plain)
    good = loras.save(tmp_path, loras.tensors(made), "good")
    assert not np.array_equal(pixels(engine, styled(good)), plain)
    assert failure(engine, good, file).startswith("lora 2: the LoRA cannot be used")
    assert np.array_equal(pixels(engine, ask()), plain)


def test_nothing_stays_of_a_lora_that_cannot_be_used(engine, tmp_path):
    """What was read of a LoRA that is refused does not stay in memory, and it is refused again as before."""
    made = loras.tensors(loras.halves(pipe_of(engine)))
    made["unet.conv_in.lora_A.weight"] = torch.zeros(1, 1, 1, 1)
    file = loras.save(tmp_path, made)
    says = failure(engine, file)
    gc.collect()
    exceptions = [each for each in gc.get_objects() if type(each) is PromptFailed and str(each) == says]
    assert says == failure(engine, file)
    assert not exceptions


@pytest.mark.parametrize("pair", [("sdxl", "sd1"), ("sd1", "sdxl"), ("sd3", "sd1"), ("sd1", "flux")])
@pytest.mark.parametrize("style", loras.FORMATS)
def test_another_familys_lora_is_refused(loaded, engines, tmp_path, pair, style):
    """A LoRA of another family is refused, in whatever format, and leaves the model as it was."""
    made_for, family = pair
    if made_for == "sd3" and style != "peft":
        pytest.skip("kohya's and diffusers' old names are the UNets' own")
    engine = engines(family)
    before = pixels(engine, ask())
    file = loras.save(tmp_path, loras.tensors(loras.halves(pipe_of(loaded(made_for)), text=True), style))
    assert "the LoRA cannot be used: " in failure(engine, file)
    assert np.array_equal(pixels(engine, ask()), before)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x80\x04\x95pickle", b"\xff" * 64])
def test_what_is_no_safetensors_is_refused(engine, tmp_path, content):
    """An error page, a pickle and a torn file are refused by what they are."""
    file = tmp_path / "style.safetensors"
    file.write_bytes(content)
    assert "it is not a valid safetensors file" in failure(engine, str(file))
    (gone,) = draw(engine, styled(str(tmp_path / "missing")))  # out of the cache: worth another try
    assert gone.code is ErrorCode.GENERATION_FAILED


def test_pictures_of_a_feature_cache_take_loras(tiny, engine, style):
    """A LoRA works beside a feature cache: computed whole at each step, the picture is the very same."""
    cached = open_engine(tiny("sd1"), feature_cache=2)
    wanted = {"num_inference_steps": 1}
    ours, plain = pixels(cached, styled(style, **wanted)), pixels(cached, ask(**wanted))
    assert not np.array_equal(ours, plain)
    assert np.abs(ours.astype(int) - pixels(engine, styled(style, **wanted))).max() <= 1


def test_weights_that_only_read_texts_are_switched_too(engine, tmp_path):
    """A LoRA of the text encoder alone changes the picture of a text that was read without it before."""
    made = {
        name: pair
        for name, pair in loras.halves(pipe_of(engine), text=True, size=2).items()
        if "unet" not in name
    }
    file = loras.save(tmp_path, loras.tensors(made))
    plain, other = pixels(engine, ask()), pixels(engine, styled(file))
    assert not np.array_equal(plain, other)
    assert np.array_equal(pixels(engine, styled(file)), other)
    assert np.array_equal(pixels(engine, ask()), plain)
    assert not np.array_equal(pixels(engine, styled(file, weight=2)), other)


def test_a_model_without_loras_of_its_own_kind_says_so(engine, style):
    """A pipeline that takes no LoRAs refuses them with a sentence."""

    class Bare:
        unet = copy.copy(pipe_of(engine).unet)

    with pytest.raises(PromptFailed, match="models of this kind do not support LoRAs"):
        Adapters(Bare()).use(styled(style))


def test_neighbours_in_a_batch_share_a_lora(engine, style):
    """Each picture of a batch with a LoRA is that of its own seed."""
    batch = draw(engine, *(styled(style, seed=seed) for seed in range(3)))
    assert len({image.pixels.tobytes() for image in chain(batch)}) == 3
