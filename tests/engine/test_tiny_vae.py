"""Another autoencoder in the place of a model's own: it decodes as the pipelines do with it, if it fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.engine.conftest import ask, draw, edit, look, open_engine, pipe_of
from text2img.engine.devices import suppress_warnings
from text2img.errors import ConfigurationError, ModelFailed

TINY = "tiny autoencoder"


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_decodes_as_the_pipeline_does(tiny, loaded, family):
    """The picture is, within one level, the pipeline's own with that autoencoder, and not the model's own."""
    engine = open_engine(tiny(family), autoencoder=str(tiny(TINY)))
    (picture,), (plain,) = draw(engine, ask(1)), draw(loaded(family), ask(1))
    with suppress_warnings():
        from diffusers import AutoencoderTiny, DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(tiny(family), local_files_only=True)
        pipe.vae = AutoencoderTiny.from_pretrained(tiny(TINY))
        pipe.set_progress_bar_config(disable=True)
        (image,) = pipe(
            "a cat",
            num_inference_steps=2,
            guidance_scale=5.0,
            width=64,
            height=64,
            generator=torch.Generator().manual_seed(1),
        ).images
    assert np.abs(np.asarray(image).astype(int) - picture.pixels).max() <= 1
    assert np.abs(plain.pixels.astype(int) - picture.pixels).max() > 8


def test_the_models_own_is_not_loaded(tiny):
    """What decodes is the tiny one alone, in the engine's dtype; the card says which it is."""
    engine = open_engine(tiny("sd1"), autoencoder=str(tiny(TINY)), dtype="bf16")
    assert type(pipe_of(engine).vae).__name__ == "AutoencoderTiny"
    assert pipe_of(engine).vae.dtype == torch.bfloat16
    assert engine.inspect().approximations == {"autoencoder": str(tiny(TINY))}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"_class_name": "VQModel"}, "holds VQModel; it must be an AutoencoderTiny"),
        ({"_class_name": "AutoModel", "auto_map": {"AutoModel": "evil.Model"}}, "must be an AutoencoderTiny"),
        ({"latent_channels": 16}, "latent channels are 16 and the model's 4"),
        ({"decoder_block_out_channels": [8, 8, 8]}, "pixels a latent are 4 and the model's 8"),
        ({"out_channels": 4}, "colours are 4 and the model's 3"),
    ],
    ids=["class", "code", "channels", "scale", "colours"],
)
def test_what_does_not_fit_is_refused(tiny, copy, config, says):
    """Another class or other widths are wrong usage, found by inspection and said in one sentence."""
    folder = copy(TINY)
    edit(folder / "config.json", **config)
    with pytest.raises(ConfigurationError, match=says):
        look(tiny("sd1"), autoencoder=str(folder))


def test_a_full_one_decodes_in_the_models_place(tiny, copy, loaded):
    """An AutoencoderKL of the same latent space decodes, and is recorded, but not as an approximation."""
    folder = copy("sd1") / "vae"
    file = folder / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_out.bias"] += 0.5
    save_file(weights, file, {"format": "pt"})
    edit(folder / "config.json", force_upcast=False)  # as an autoencoder that was made safe for fp16 says
    engine = open_engine(tiny("sd1"), autoencoder=str(folder))
    (picture,), (plain,) = draw(engine, ask(1)), draw(loaded("sd1"), ask(1))
    assert picture.pixels.mean() > plain.pixels.mean() + 20
    info = engine.inspect()
    assert info.parts == {"autoencoder": str(folder)}
    assert info.approximations == {}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"scaling_factor": 0.13025}, "scaling_factor are 0.13025 and the model's 0.18215"),
        ({"shift_factor": 0.1}, "shift_factor are 0.1 and the model's None"),
        ({"latents_mean": [0, 0, 0, 0]}, "latents_mean are"),
        ({"latent_channels": 16}, "latent channels are 16 and the model's 4"),
        ({"block_out_channels": [8, 8, 8]}, "pixels a latent are 4 and the model's 8"),
    ],
    ids=["scaling", "shift", "mean", "channels", "scale"],
)
def test_a_full_one_of_another_latent_space_is_refused(tiny, copy, config, says):
    """What one space's latents mean in another is noise: the difference is named."""
    folder = copy("sd1") / "vae"
    edit(folder / "config.json", **config)
    with pytest.raises(ConfigurationError, match=says):
        look(tiny("sd1"), autoencoder=str(folder))


def test_models_that_decode_by_themselves_are_refused(tiny):
    """A pipeline that the engine's table does not know keeps its own autoencoder."""
    with pytest.raises(ConfigurationError, match="LatentConsistencyModelPipeline"):
        look(tiny("lcm"), autoencoder=str(tiny(TINY)))


def _without_weights(folder):
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")


def _without_configuration(folder):
    (folder / "config.json").unlink()


def _cut(folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_without_weights, "pickled weights only"),
        (_without_configuration, "config.json is missing"),
        (_cut, "is truncated"),
    ],
)
def test_damaged_ones_are_found_by_inspection(tiny, copy, damage, says):
    """Pickles, a missing configuration and a cut file fail the run before any weights are read."""
    folder = copy(TINY)
    damage(folder)
    with pytest.raises(ModelFailed, match=says):
        look(tiny("sd1"), autoencoder=str(folder))


def test_weights_that_are_not_its_configurations(tiny, copy):
    """Layers that the file lacks are not filled with random numbers: the load fails."""
    folder = copy(TINY)
    edit(folder / "config.json", num_decoder_blocks=[2, 1, 1, 1])
    with pytest.raises(ModelFailed, match="the weights of the model's vae"):
        open_engine(tiny("sd1"), autoencoder=str(folder))


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("./nowhere", ModelFailed, "no autoencoder folder at ./nowhere"),
        ("owner/tiny", ModelFailed, "no copy of owner/tiny"),
        ("owner/tiny@v1", ModelFailed, "no copy of owner/tiny"),
        ("gs://bucket/tiny", ConfigurationError, "autoencoders at gs:// cannot be read"),
    ],
)
def test_not_there(tiny, name, error, says):
    """A name that leads nowhere is told of as a model's is."""
    with pytest.raises(error, match=says):
        look(tiny("sd1"), autoencoder=name)


def test_pictures_are_whole(tiny):
    """Together with a feature cache, and for a batch: as many pictures, of the size that was asked for."""
    engine = open_engine(tiny("sd1"), autoencoder=str(tiny(TINY)), feature_cache=2)
    pictures = draw(engine, *(ask(n, width=96, height=64) for n in range(3)))
    assert [Image.fromarray(picture.pixels).size for picture in pictures] == [(96, 64)] * 3
    both = {"autoencoder": str(tiny(TINY)), "feature_cache": 2}
    assert engine.inspect().approximations == both
