"""Schedulers by name."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from tests.engine.conftest import ask, draw, edit, look, open_engine, pipe_of
from text2img.engine.devices import suppress_warnings
from text2img.engine.model_folder import FAMILIES
from text2img.engine.schedulers import SHORT_NAMES, Schedulers, fitting_names
from text2img.errors import ModelUnusable, PromptFailed
from text2img.prompts import SCHEDULERS


def test_every_name_has_a_class():
    """The names that requests may use are those that the engine can make."""
    assert set(SHORT_NAMES.values()) == set(SCHEDULERS)
    assert all(set(family.names) <= set(SCHEDULERS) for family in FAMILIES.values())


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_each_draws_and_is_recorded(loaded, family):
    """Each scheduler the card names draws its own picture, twice the same, and is recorded by its name."""
    engine = loaded(family)
    seen = {}
    for name in engine.inspect().schedulers:
        request = ask(scheduler=name, num_inference_steps=4)
        (once,), (again,) = draw(engine, request), draw(engine, request)
        assert (once.pixels == again.pixels).all()
        assert once.scheduler == name
        seen[name] = once.pixels.tobytes()
    assert len(set(seen.values())) == len(seen)


def test_own(loaded):
    """None is the model's own, recorded by its name; asking for it by name is the same."""
    engine = loaded("sd1")
    (own,) = draw(engine, ask())
    draw(engine, ask(scheduler="euler"))
    (named,) = draw(engine, ask(scheduler="pndm"))
    (later,) = draw(engine, ask())
    assert own.scheduler == named.scheduler == later.scheduler == "pndm"
    assert (own.pixels == named.pixels).all()
    assert (own.pixels == later.pixels).all()


def test_own_without_a_name(copy):
    """A model's own scheduler that no request can name is recorded by its class."""
    folder = copy("sd1")
    edit(folder / "model_index.json", scheduler=["diffusers", "DEISMultistepScheduler"])
    engine = open_engine(folder)
    (image,) = draw(engine, ask())
    assert image.scheduler == engine.inspect().scheduler == "DEISMultistepScheduler"
    (named,) = draw(engine, ask(scheduler="ddim"))
    assert (image.scheduler, named.scheduler) == ("DEISMultistepScheduler", "ddim")


def test_configuration_is_kept(loaded):
    """Every scheduler keeps the model's noise schedule; the own one's configuration never changes."""
    from diffusers import PNDMScheduler

    own = PNDMScheduler.from_config(pipe_of(loaded("sd1")).scheduler.config)
    before = dict(own.config)
    schedulers = Schedulers(own, flow=False)
    with suppress_warnings():
        for name in SCHEDULERS:
            made = schedulers.get(name)
            assert SHORT_NAMES[type(made).__name__] == name
            assert made is schedulers.get(name)
            assert (made.config.beta_start, made.config.beta_schedule) == (0.00085, "scaled_linear")
    assert dict(own.config) == before


def test_defaults_do_not_clip():
    """DDIM made from a configuration that is silent on clipping does not clip latents, its own default."""
    from diffusers import DPMSolverMultistepScheduler

    own = DPMSolverMultistepScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    made = Schedulers(own, flow=False)
    assert made.get("ddim").config.clip_sample is False
    assert made.get("pndm").config.skip_prk_steps is True
    assert made.get("dpm++") is own


def test_v_prediction_is_kept():
    """A model that predicts velocity is drawn so by every scheduler."""
    from diffusers import DDIMScheduler

    made = Schedulers(DDIMScheduler(prediction_type="v_prediction"), flow=False)
    with suppress_warnings():
        assert {made.get(name).config.prediction_type for name in SCHEDULERS} == {"v_prediction"}


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_every_step_looks_alike(tiny, scheduler):
    """With weights as they lie on a GPU, all that goes into the UNet has at each step the shape, kind and
    strides of the first: what is compiled for two steps is right for fifty.
    """
    engine = open_engine(tiny("sd1"))
    unet, seen = pipe_of(engine).unet, []
    unet.to(memory_format=torch.channels_last)
    hook = unet.register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append(
            [
                (one.shape, one.dtype, one.stride())
                for one in [*args, *kwargs.values()]
                if torch.is_tensor(one)
            ]
        ),
        with_kwargs=True,
    )
    draw(
        engine,
        ask(0, num_inference_steps=6, scheduler=scheduler),
        ask(1, num_inference_steps=6, scheduler=scheduler),
    )
    hook.remove()
    assert len(seen) >= 6
    assert all(one == seen[0] for one in seen)


EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "num_train_timesteps": 1000}


def _with_scheduler(folder, name, **config):
    """The folder, with another scheduler as its own."""
    edit(folder / "model_index.json", scheduler=["diffusers", name])
    content = json.dumps({"_class_name": name, **config})
    (folder / "scheduler" / "scheduler_config.json").write_text(content)
    return folder


@pytest.mark.parametrize("own", ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"])
def test_edm(copy, own):
    """An EDM model is drawn by EDM's own DPM++ and Euler, with its sigmas, and by no other."""
    engine = open_engine(_with_scheduler(copy("sd1"), own, **EDM))
    assert engine.inspect().schedulers == ("dpm++", "euler")
    images = {name: draw(engine, ask(scheduler=name))[0] for name in (None, "dpm++", "euler")}
    assert images[None].scheduler == SHORT_NAMES[own]
    assert (images[None].pixels == images[SHORT_NAMES[own]].pixels).all()
    for name in ("dpm++", "euler"):
        made = engine._loaded.schedulers.get(name)
        assert type(made).__name__.startswith("EDM")
        assert (made.config.sigma_max, made.config.sigma_data) == (80.0, 0.5)
    for name in set(SCHEDULERS) - {"dpm++", "euler"}:
        with pytest.raises(PromptFailed, match=r"it supports dpm\+\+, euler"):
            engine.prepare(ask(scheduler=name))


def test_zero_terminal_snr(copy):
    """Schedulers that ignore a zero terminal SNR are not offered; the others get it, with v-prediction."""
    config = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    engine = open_engine(_with_scheduler(copy("sd1"), "DDIMScheduler", **config))
    names = engine.inspect().schedulers
    assert set(SCHEDULERS) - set(names) == {"heun", "pndm"}
    with suppress_warnings():
        for name in names:
            made = engine._loaded.schedulers.get(name).config
            assert {key: made[key] for key in config} == config


@pytest.mark.parametrize(
    ("class_name", "config", "expected"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, ("euler", "heun")),
        ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, ("euler",)),
        ("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.02}, ("euler",)),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, ("euler", "heun")),
    ],
)
def test_flow_matching(class_name, config, expected):
    """Heun's scheduler of flow matching is offered only where it has all of the model's settings."""
    assert fitting_names(("euler", "heun"), class_name, config) == expected


def test_shift_of_a_multistep_solver():
    """The shift of a flow-matching model keeps its value where another class has another name for it."""
    from diffusers import UniPCMultistepScheduler

    own = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6.0)
    with suppress_warnings():
        assert Schedulers(own, flow=True).get("euler").config.shift == 6.0


@pytest.mark.parametrize(
    ("name", "config", "package"),
    [
        ("LMSDiscreteScheduler", {}, "scipy"),
        ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "scipy"),
        ("DPMSolverSDEScheduler", {}, "torchsde"),
    ],
)
def test_a_package_that_is_missing(copy, monkeypatch, name, config, package):
    """A model whose own scheduler needs a package that is not there is refused, and the package named."""
    folder = _with_scheduler(copy("sd1"), name, **config)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelUnusable, match=f"{name}, needs the Python package {package}") as refused:
        look(folder)
    assert refused.value.exit_status == 2
    monkeypatch.setitem(sys.modules, package, sys)
    assert look(folder).family == "sd"
