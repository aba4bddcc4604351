"""What is found wrong with a model's folder before its weights are read."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.engine.conftest import edit, look
from text2img.errors import ConfigurationError, ModelFailed, ModelUnusable

SD1_WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("sd1", ("sd", 64, 64, 8, "pndm", 8)),
        ("sdxl", ("sdxl", 64, 64, 8, "euler", 8)),
        ("sd3", ("sd3", 64, 64, 16, "euler", 2)),
        ("flux", ("flux", 1024, 1024, 16, "euler", 1)),
    ],
)
def test_card(tiny, family, expected):
    """The card tells family, size, multiple and schedulers of each family's model."""
    model_info = look(tiny(family))
    told = (
        model_info.family,
        model_info.width,
        model_info.height,
        model_info.multiple,
        model_info.scheduler,
        len(model_info.schedulers),
    )
    assert told == expected
    assert model_info.revision is None


def test_inspection_needs_no_torch(tiny):
    """Inspecting a local folder imports neither torch nor diffusers nor transformers."""
    code = (
        "import sys; from text2img.engine.diffusers import DiffusersEngine as E;"
        "from text2img.engine import EngineOptions as O;"
        f"E(O(model={str(tiny('sd1'))!r}, device='cpu')).inspect();"
        "sys.exit(','.join({'torch', 'diffusers', 'transformers'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stderr.strip(), done.returncode) == ("", 0)


@pytest.mark.parametrize("name", ["{tmp}/none", "./none", "none", "a/b/c", "~/none-such", "x\ny/z"])
def test_missing_folder(tmp_path, name):
    """A name that can only be a folder, and is none, is said to be no model folder."""
    with pytest.raises(ModelFailed, match="no model folder at"):
        look(name.format(tmp=tmp_path))


def test_relative_folder(copy, monkeypatch):
    """A name that looks like a hub id but is a folder here is that folder."""
    folder = copy("sd1")
    monkeypatch.chdir(folder.parent.parent)
    assert look(f"{folder.parent.name}/sd1").family == "sd"


def test_gs_model():
    """The engine alone reads no bucket, and says so; whoever finds its models may."""
    with pytest.raises(ConfigurationError, match="gs:// cannot be read"):
        look("gs://bucket/model")


@pytest.mark.parametrize("content", [None, "{", "[]", '{"unet": 1}', '{"_class_name": ["mine", "Pipe"]}'])
def test_bad_index(copy, content):
    """A model_index.json that is missing, broken, empty, or names code of the model's own is an error."""
    index = copy("sd1") / "model_index.json"
    index.unlink() if content is None else index.write_text(content)
    with pytest.raises(ModelFailed, match=r"model_index\.json"):
        look(index.parent)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("NoSuchPipeline", "the installed diffusers .* has no pipeline NoSuchPipeline"),
        ("UNet2DConditionModel", "has no pipeline UNet2DConditionModel"),
        ("StableDiffusionImg2ImgPipeline", "StableDiffusionImg2ImgPipeline needs an image beside the text"),
        ("FluxControlPipeline", "FluxControlPipeline needs a control image beside the text"),
        ("FluxKontextPipeline", "FluxKontextPipeline needs an image beside the text"),
        ("StableDiffusionGLIGENPipeline", "StableDiffusionGLIGENPipeline needs boxes beside the text"),
        ("MusicLDMPipeline", "MusicLDMPipeline makes sound, not images"),
        ("HeliosPipeline", "HeliosPipeline makes videos, not images"),
        ("WanPipeline", "WanPipeline does not return images"),
        ("StableDiffusionLatentUpscalePipeline", "needs an image beside the text"),
    ],
)
def test_not_text_to_image(copy, name, why):
    """A pipeline that is unknown, or wants or makes something else, is refused by what it is, status 2."""
    folder = copy("sd1")
    edit(folder / "model_index.json", _class_name=name)
    with pytest.raises(ModelUnusable, match=why) as refused:
        look(folder)
    assert refused.value.exit_status == 2


def test_modular_repository(copy):
    """A modular repository has no pipeline's index, and is called by its name."""
    folder = copy("sd1")
    (folder / "model_index.json").rename(folder / "modular_model_index.json")
    with pytest.raises(ModelUnusable, match="modular repository"):
        look(folder)


@pytest.mark.parametrize("library", ["my_code", "os", "stable_diffusion/../..", None])
def test_remote_code(copy, library):
    """A component from another library than diffusers and transformers is never imported."""
    folder = copy("sd1")
    (folder / "unet" / "my_code.py").write_text("raise SystemExit('ran')")
    edit(folder / "model_index.json", unet=[library, "UNet2DConditionModel"])
    with pytest.raises(ModelFailed, match="never run"):
        look(folder)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_component_folder_missing(copy, name):
    """A component that is listed must have its folder."""
    folder = copy("sd1")
    shutil.rmtree(folder / name)
    with pytest.raises(ModelFailed, match=f"lists {name}"):
        look(folder)


def test_component_not_listed(copy):
    """A component that the pipeline needs must be listed."""
    folder = copy("sd1")
    edit(folder / "model_index.json", unet=[None, None])
    with pytest.raises(ModelFailed, match="lists no unet"):
        look(folder)


@pytest.mark.parametrize("name", ["unet", "scheduler", "text_encoder"])
@pytest.mark.parametrize("content", [None, "{"])
def test_component_config(copy, name, content):
    """A component whose configuration is missing or broken is an error."""
    (config,) = (copy("sd1") / name).glob("*config.json")
    config.unlink() if content is None else config.write_text(content)
    with pytest.raises(ModelFailed, match="config"):
        look(config.parent.parent)


@pytest.mark.parametrize(("component", "file"), SD1_WEIGHTS.items())
@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_weights(copy, component, file, keep):
    """A weight file that is cut anywhere is found by its length, in any component."""
    weights = copy("sd1") / component / file
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelFailed, match=f"{component}/{file} is truncated"):
        look(weights.parent.parent)


def test_html_instead_of_weights(copy):
    """A web page saved as weights is not a safetensors file."""
    weights = copy("sd1") / "unet" / SD1_WEIGHTS["unet"]
    weights.write_text("<!doctype html><title>Sign in</title>" * 99)
    with pytest.raises(ModelFailed, match="not a safetensors file"):
        look(weights.parent.parent)


def test_pickles_only(copy):
    """A folder with .bin weights alone is refused, since reading them can run code."""
    weights = copy("sd1") / "unet" / SD1_WEIGHTS["unet"]
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelFailed, match="pickled"):
        look(weights.parent.parent)


def test_no_weights(copy):
    """A folder without weights is told to be fetched again."""
    folder = copy("sd1")
    (folder / "vae" / SD1_WEIGHTS["vae"]).unlink()
    with pytest.raises(ModelFailed, match="no weights"):
        look(folder)


def test_shards(tiny, tmp_path):
    """Sharded weights are read by their index; a shard that is missing is named."""
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(tiny("sd1"), tmp_path / "sd1")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    (folder / "unet" / SD1_WEIGHTS["unet"]).unlink()
    unet.save_pretrained(folder / "unet", max_shard_size="100KB")
    shards = sorted((folder / "unet").glob("*-of-*"))
    assert len(shards) > 1
    assert look(folder).family == "sd"
    shards[1].unlink()
    with pytest.raises(ModelFailed, match=f"{shards[1].name}, which is missing"):
        look(folder)


def test_variant_missing(copy, caplog):
    """A variant that is not there gives way to the plain files, with a warning."""
    assert look(copy("sd1"), variant="fp16").family == "sd"
    assert "no variant fp16" in caplog.text


def test_only_variants(copy):
    """With two variants and no plain files, one must be asked for; the only variant is taken unasked."""
    folder = copy("sd1")
    for name, weights in SD1_WEIGHTS.items():
        file = folder / name / weights
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert look(folder).family == "sd"
    assert look(folder, variant="fp16").family == "sd"
    with pytest.raises(ConfigurationError, match="no variant bf16 and no plain weights"):
        look(folder, variant="bf16")
    file = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(file, file.with_name("diffusion_pytorch_model.bf16.safetensors"))
    with pytest.raises(
        ConfigurationError, match="only the variants bf16, fp16; ask for one of them with --var"
    ):
        look(folder)


def test_checker_folder_missing(tiny, tmp_path):
    """A safety checker that is listed must be there, unless it is switched off."""
    folder = shutil.copytree(tiny("sd1"), tmp_path / "sd1")
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    with pytest.raises(ModelFailed, match="safety_checker: false"):
        look(folder)
    assert look(folder, safety_checker=False).family == "sd"


def test_the_card_tells_how_many_steps(copy):
    """As many as the scheduler was trained with, LCM's as it was distilled from; steps beyond are refused."""
    folder = copy("sd1")
    edit(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=40)
    model_info = look(folder)
    assert (model_info.max_steps[model_info.scheduler], model_info.max_steps["lcm"]) == (40, 50)
