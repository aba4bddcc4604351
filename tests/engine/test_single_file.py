"""A model in one file under its makers' key names: it draws as the folder that it was made from."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.conftest import ask, draw, edit, look, open_engine, pipe_of
from text2img.engine import EngineOptions
from text2img.engine.devices import suppress_warnings
from text2img.engine.loading import find, wanted_files
from text2img.engine.model_folder import is_stored_in_bf16
from text2img.engine.single_file import components_in_file, read_single_file
from text2img.errors import ConfigurationError, ModelFailed

with suppress_warnings():
    from tests.engine import models, original

FILES = {"sd1": original.sd1, "sd2": original.sd2, "sdxl": original.sdxl, "sd3": original.sd3}


def family_of(name):
    """Stable Diffusion 2 is 1 with another text encoder, and its file has that in OpenCLIP's names."""
    return "sd1" if name == "sd2" else name


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    """The one file of a tiny model, written once."""
    root = tmp_path_factory.mktemp("files")

    def file(name):
        path = root / f"{name}.safetensors"
        if not path.exists():
            original.write(path, FILES[name](models.FAMILIES[family_of(name)]()))
        return path

    return file


@pytest.fixture
def base(copy):
    """A whole model of the family whose own weights draw something else."""

    def other(family):
        folder = copy(family)
        for file in folder.rglob("*.safetensors"):
            changed = {
                key: weight + 0.05 if weight.is_floating_point() else weight
                for key, weight in load_file(file).items()
            }
            save_file(changed, file, {"format": "pt"})
        return folder

    return other


def changed(file, tmp_path, change):
    """A copy of the file whose weights ``change`` has changed."""
    weights = load_file(file)
    change(weights)
    return original.write(tmp_path / "changed.safetensors", weights)


def pixels(engine, **wanted):
    (image,) = draw(engine, ask(1, **wanted))
    return image.pixels


@pytest.mark.parametrize("name", FILES)
def test_draws_as_its_folder(loaded, file_of, base, name):
    """The file's image is the folder's, bit for bit, whatever weights the base has."""
    folder = base(family_of(name))
    engine = open_engine(file_of(name), base=str(folder))
    assert np.array_equal(pixels(engine), pixels(loaded(family_of(name))))
    info = engine.inspect()
    assert info.name == str(file_of(name))
    assert info.parts == {"model_base": str(folder)}
    assert {part for part, source in info.sources.items() if source == str(folder)} == {
        part for part in info.sources if part.startswith(("scheduler", "tokenizer"))
    }


def test_what_the_file_lacks_is_the_bases(loaded, file_of, base, tmp_path):
    """A file without autoencoder and text encoder, as of a fine-tuned UNet, draws with the base's."""

    def only_unet(weights):
        for key in [key for key in weights if not key.startswith("model.diffusion_model.")]:
            del weights[key]

    file = changed(file_of("sd1"), tmp_path, only_unet)
    folder = base("sd1")
    mixed = pipe_of(open_engine(file, base=str(folder)))
    theirs, whole = pipe_of(open_engine(folder)), pipe_of(loaded("sd1"))
    for part, origin in (("unet", whole), ("vae", theirs), ("text_encoder", theirs)):
        expected, actual = getattr(origin, part).state_dict(), getattr(mixed, part).state_dict()
        assert all(torch.equal(weight, actual[key]) for key, weight in expected.items()), part


@pytest.mark.parametrize("name", ["flux", "sd1"])
def test_a_denoiser_in_diffusers_own_names(tiny, loaded, base, name):
    """The weights of a folder's denoiser are such a file, without any prefix."""
    folder = tiny(name) / ("transformer" if name == "flux" else "unet")
    theirs = base(name)
    engine = open_engine(next(folder.glob("*.safetensors")), base=str(theirs))
    part = "transformer" if name == "flux" else "unet"
    expected = getattr(pipe_of(loaded(name)), part).state_dict()
    actual = getattr(pipe_of(engine), part).state_dict()
    assert all(torch.equal(weight, actual[key]) for key, weight in expected.items())
    assert engine.inspect().sources[part] != str(theirs)


def test_which_encoder_t5_is():
    """Files name it alike: it is SD3's third encoder, Flux's second, and another model's only one."""
    t5, clip = "text_encoders.t5xxl.transformer.shared.weight", "text_encoders.clip_l.transformer.x"
    for keys, component in (
        (["joint_blocks.0.x", t5], "text_encoder_3"),
        ([clip, "text_encoders.clip_g.transformer.x", t5], "text_encoder_3"),
        (["double_blocks.0.x", "single_blocks.0.x", "vector_in.x", t5], "text_encoder_2"),
        ([clip, t5], "text_encoder_2"),
        (["layers.0.x", t5], "text_encoder"),
    ):
        assert t5 in components_in_file(keys)[component]


def test_flux_whole(loaded, base, tmp_path):
    """A file with Flux's encoders and autoencoder has its folder's weights and draws as that.

    A weight's place in the memory, which a file decides, may change the rounding of a product.
    """
    pipe = models.flux()
    weights = {
        **pipe.transformer.state_dict(),
        **original.vae(pipe.vae, "vae."),
        **original.clip(pipe.text_encoder, "text_encoders.clip_l.transformer."),
        **original.t5(pipe.text_encoder_2, "text_encoders.t5xxl.transformer."),
    }
    file = original.write(tmp_path / "flux.safetensors", weights)
    engine, folder = open_engine(file, base=str(base("flux"))), loaded("flux")
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        expected, actual = (getattr(pipe_of(each), part).state_dict() for each in (folder, engine))
        assert all(torch.equal(weight, actual[key]) for key, weight in expected.items()), part
    assert np.abs(pixels(engine).astype(int) - pixels(folder)).max() <= 1


FLUX = {
    "time_in": {"in_layer": (3072, 256), "out_layer": (3072, 3072)},
    "vector_in": {"in_layer": (3072, 32), "out_layer": (3072, 3072)},
    "guidance_in": {"in_layer": (3072, 256), "out_layer": (3072, 3072)},
    "": {"txt_in": (3072, 32), "img_in": (3072, 16)},
    "final_layer": {"linear": (16, 3072), "adaLN_modulation.1": (6144, 3072)},
    "single_blocks.0": {"modulation.lin": (9216, 3072), "linear1": (21504, 3072), "linear2": (3072, 15360)},
    "double_blocks.0": {
        f"{side}_{part}": shape
        for side in ("img", "txt")
        for part, shape in {
            "mod.lin": (18432, 3072),
            "attn.qkv": (9216, 3072),
            "attn.proj": (3072, 3072),
            "mlp.0": (12288, 3072),
            "mlp.2": (3072, 12288),
        }.items()
    },
}
NORMS = [
    *(
        f"double_blocks.0.{side}_attn.norm.{of}_norm.scale"
        for side in ("img", "txt")
        for of in ("query", "key")
    ),
    *(f"single_blocks.0.norm.{of}_norm.scale" for of in ("query", "key")),
]


def flux_shapes():
    layers = {f"{at}.{part}".strip("."): shape for at, parts in FLUX.items() for part, shape in parts.items()}
    return (
        {f"{name}.weight": shape for name, shape in layers.items()}
        | {f"{name}.bias": shape[:1] for name, shape in layers.items()}
        | dict.fromkeys(NORMS, (128,))
    )


def hollow(file, shapes):
    """A safetensors file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)
    return file


def test_flux_in_its_makers_names(copy, tmp_path):
    """Diffusers splits Flux's layers at 3072 alone: two layers of that width are checked by their header."""
    folder = copy("flux")
    edit(folder / "transformer" / "config.json", num_attention_heads=24, attention_head_dim=128)
    edit(folder / "transformer" / "config.json", axes_dims_rope=[16, 56, 56])
    shapes = flux_shapes()
    info = look(hollow(tmp_path / "flux.safetensors", shapes), base=str(folder))
    assert info.sources["transformer"].endswith("flux.safetensors")
    with pytest.raises(ConfigurationError, match=r"holds a Flux model .* such as black-forest-labs/FLUX"):
        look(tmp_path / "flux.safetensors")
    prefixed = {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}
    prefixed.pop("model.diffusion_model.single_blocks.0.linear2.bias")
    with pytest.raises(ConfigurationError, match=r"it lacks single_blocks.0.linear2.bias"):
        look(hollow(tmp_path / "less.safetensors", prefixed), base=str(folder))


@pytest.mark.parametrize("flags", [("v_pred",), ("v_pred", "ztsnr"), ("ztsnr",)], ids="+".join)
def test_the_noise_that_it_was_trained_with(loaded, file_of, base, tmp_path, flags):
    """v_pred and ztsnr in the file set the scheduler as its documentation does, and change the image."""
    file = changed(
        file_of("sdxl"), tmp_path, lambda weights: weights.update(dict.fromkeys(flags, torch.tensor([])))
    )
    engine = open_engine(file, base=str(base("sdxl")))
    with suppress_warnings():
        from diffusers import DiffusionPipeline, EulerDiscreteScheduler

        pipe = DiffusionPipeline.from_pretrained(loaded("sdxl").inspect().name, local_files_only=True)
        wanted = {"v_pred": {"prediction_type": "v_prediction"}, "ztsnr": {"rescale_betas_zero_snr": True}}
        settings = {name: value for flag in flags for name, value in wanted[flag].items()}
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, **settings)
        pipe.set_progress_bar_config(disable=True)
        (image,) = pipe(
            "a cat",
            num_inference_steps=2,
            guidance_scale=5.0,
            width=64,
            height=64,
            generator=torch.Generator().manual_seed(1),
        ).images
    drawn = pixels(engine)
    assert np.abs(np.asarray(image).astype(int) - drawn).max() <= 1
    assert not np.array_equal(drawn, pixels(loaded("sdxl")))


@pytest.mark.parametrize(
    ("says", "prediction"), [("v", "v_prediction"), ("epsilon", "epsilon"), ("x", "sample")]
)
def test_the_prediction_that_its_metadata_names(file_of, copy, tmp_path, says, prediction):
    """What trainers write into a file's metadata beats the base's; what is not known leaves the base's."""
    folder = copy("sd1")
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")
    named = {"modelspec.prediction_type": says}
    file = original.write(tmp_path / "named.safetensors", load_file(file_of("sd1")), **named)
    model, _ = read_single_file(EngineOptions(model=str(file), base=str(folder)), find)
    assert model.components["scheduler"].config["prediction_type"] == prediction


def test_zero_snr_wants_a_scheduler_that_has_it(file_of, tiny, tmp_path):
    """PNDM would ignore the setting in silence: another base is asked for."""
    file = changed(file_of("sd1"), tmp_path, lambda weights: weights.update(ztsnr=torch.tensor([])))
    with pytest.raises(ConfigurationError, match="PNDMScheduler\\) does not support"):
        look(file, base=str(tiny("sd1")))


def test_what_training_leaves_behind_does_no_harm(file_of, tiny, tmp_path):
    """Schedules, averages, positions and scales, which no image depends on, are passed over."""
    left = [
        "betas",
        "alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_mean_coef1",
        "model_ema.decay",
        "model_ema.diffusion_modeltime_embed0weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.logit_scale",
    ]
    file = changed(
        file_of("sd1"), tmp_path, lambda weights: weights.update(dict.fromkeys(left, torch.zeros(1)))
    )
    assert look(file, base=str(tiny("sd1"))).family == "sd"


CONV = "model.diffusion_model.out.2.weight"


def _lora(weights):
    weights.clear()
    weights["lora_unet_mid_block.lora_down.weight"] = torch.zeros(1)


def _renamed(weights):
    for key in [key for key in weights if key.startswith("model.diffusion_model")]:
        weights[f"model.diffusion_model.inner.{key}"] = weights.pop(key)


def _only_vae(weights):
    for key in [key for key in weights if not key.startswith("first_stage")]:
        del weights[key]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda weights: weights.pop(CONV), "base's unet: 1 weights are missing, such as conv_out.weight"),
        (
            lambda weights: weights.pop("first_stage_model.decoder.norm_out.bias"),
            "base's vae: 1 weights are miss",
        ),
        (
            lambda weights: weights.pop(
                "cond_stage_model.transformer.text_model.encoder.layers.2.layer_norm1.bias"
            ),
            "base's text_encoder: 1 weights are missing, such as encoder.layers.2.layer_norm1.bias",
        ),
        (
            lambda weights: weights.update({CONV: torch.zeros(4, 8, 3, 3)}),
            "1 weights are misshapen, such as conv_",
        ),
        (
            lambda weights: weights.update({f"{CONV}_scale": torch.zeros(1)}),
            f"holds weights that no component of the base takes: {CONV}_scale;",
        ),
        (lambda weights: weights.update(scaled_fp8=torch.zeros(2)), "takes: scaled_fp8;"),
        (
            lambda weights: weights.update({"edm_mean": torch.zeros(4)}),
            "is an EDM model, and the base's scheduler",
        ),
        (_lora, "is a LoRA, not a model"),
        (_only_vae, r"holds no denoiser \(only vae\)"),
        (_renamed, "base's unet: 208 weights are missing, such as conv_in.bias; give the base"),
    ],
    ids=["unet", "vae", "encoder", "shape", "scales", "fp8", "edm", "lora", "vae-only", "renamed"],
)
def test_what_does_not_fit_the_base_is_refused(file_of, tiny, tmp_path, change, says):
    """Missing, unknown and misshapen weights are wrong usage, found by the header alone."""
    with pytest.raises(ConfigurationError, match=says):
        look(changed(file_of("sd1"), tmp_path, change), base=str(tiny("sd1")))


def test_bases_that_do_not_fit(file_of, tiny, copy):
    """No base, one of another kind, a file as the base, or one beside a whole model: each is named."""
    file, folder = file_of("sdxl"), copy("sd3")
    for options, says in (
        ({}, "holds a Stable Diffusion XL model .* such as stabilityai/stable-diffusion-xl-base-1.0"),
        (
            {"base": str(tiny("sd1"))},
            "XL model, and the base .* is a StableDiffusionPipeline; give a base of",
        ),
        ({"base": str(file)}, "--model-base .* is a file; give a whole model folder"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            look(file, **options)
    with pytest.raises(ConfigurationError, match="is a whole model; leave --model-base out"):
        look(tiny("sd1"), base=str(tiny("sd1")))
    edit(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    with pytest.raises(ConfigurationError, match=r"holds a text_encoder_3, and the base .* has none"):
        look(file_of("sd3"), base=str(folder))


def test_files_that_cannot_be_read(file_of, tiny, tmp_path):
    """Pickles are never opened; a cut file and one that is nowhere are called so."""
    base = str(tiny("sd1"))
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"not opened")
    with pytest.raises(ConfigurationError, match="is a pickle, and loading those can run code"):
        look(pickle, base=base)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(file_of("sd1").read_bytes()[:-1])
    with pytest.raises(ModelFailed, match="is truncated"):
        look(cut, base=base)
    with pytest.raises(ConfigurationError, match=r"no file at .*; one on the hub is named owner/model/file"):
        look(tmp_path / "nowhere.safetensors", base=base)
    with pytest.raises(ConfigurationError, match=r"owner/model/x.safetensors is one file without"):
        look("owner/model/x.safetensors")
    with pytest.raises(ModelFailed, match="no copy of owner/model"):
        look("owner/model/x.safetensors", base=base)


def test_another_autoencoder_beside_a_file(file_of, tiny):
    """The autoencoder that is asked for decodes; the file's own is left where it is."""
    tiny_one = str(tiny("tiny autoencoder"))
    engine = open_engine(file_of("sd1"), base=str(tiny("sd1")), autoencoder=tiny_one)
    assert type(pipe_of(engine).vae).__name__ == "AutoencoderTiny"
    assert "vae" not in engine.inspect().sources


def test_a_base_without_the_weights_that_the_file_holds():
    """From the hub or a bucket, only the configuration is fetched of components that the file holds."""
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    files = [
        *("unet/config.json", "unet/diffusion_pytorch_model.safetensors"),
        *("text_encoder/config.json", "text_encoder/model.safetensors"),
    ]
    selected = wanted_files(files, index, EngineOptions(model="owner/model", without=("unet", "vae")))
    assert selected == ["model_index.json", files[0], *files[2:]]


def write_gguf(gguf, file, weights):
    """A GGUF file: matrices in 8 bits, all else as it is. Returns the weights as they are read back."""
    writer, read = gguf.GGUFWriter(file, "sd3"), {}
    for name, weight in weights.items():
        values = weight.detach().numpy()
        if values.ndim == 2 and not values.shape[1] % 32 and "embed" not in name:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            read[name] = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
        else:
            writer.add_tensor(name, values)
            read[name] = weight
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def test_a_gguf_transformer(tiny, tmp_path):
    """It draws, in 8 bits, what its weights draw when they are unpacked beforehand."""
    gguf = pytest.importorskip("gguf", reason="the library gguf (extra quantized) is not installed")
    weights = original.sd3_transformer(models.sd3().transformer, prefix="")
    unpacked = write_gguf(gguf, tmp_path / "sd3.gguf", weights)
    assert any(not torch.equal(unpacked[name], weights[name]) for name in weights)
    plain = original.write(tmp_path / "plain.safetensors", unpacked)
    drawn, expected = (
        pixels(open_engine(file, base=str(tiny("sd3")))) for file in (tmp_path / "sd3.gguf", plain)
    )
    assert np.abs(drawn.astype(int) - expected).max() <= 1
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "sd3.gguf").read_bytes()[:-4000])
    with pytest.raises(ModelFailed, match=r"cut.gguf is truncated or not a GGUF file"):
        look(tmp_path / "cut.gguf", base=str(tiny("sd3")))


def test_gguf_without_its_library(tiny, tmp_path, monkeypatch):
    """What is to be installed is named, before the file is looked at."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        ConfigurationError, match="is a GGUF file, and gguf is not installed; install it: pip"
    ):
        look(tmp_path / "model.gguf", base=str(tiny("sd3")))


def test_the_dtype_that_it_is_stored_in(file_of, tiny, tmp_path):
    """A transformer in bf16, fp8 or GGUF's types is run in bf16 on a GPU, whatever its encoders have."""
    stored = load_file(file_of("sd3"))
    for dtype, expected in ((torch.bfloat16, True), (torch.float8_e4m3fn, True), (torch.float16, False)):
        weights = {
            key: weight.to(torch.float16 if "encoders" in key else dtype) for key, weight in stored.items()
        }
        file = original.write(tmp_path / "stored.safetensors", weights)
        model, _ = read_single_file(EngineOptions(model=str(file), base=str(tiny("sd3"))), find)
        assert is_stored_in_bf16(model, {}) is expected, dtype
    transformer = dataclasses.replace(model.components["transformer"], file=tmp_path / "x.gguf")
    model = dataclasses.replace(model, components={**model.components, "transformer": transformer})
    assert is_stored_in_bf16(model, {})


def test_defaults_of_the_base(file_of, copy, tmp_path):
    """Steps and guidance are those of the base, which is a published model; the name is the file's."""
    folder = tmp_path / "stabilityai" / "sdxl-turbo"
    copy("sdxl").rename(tmp_path / "moved")
    folder.parent.mkdir()
    (tmp_path / "moved").rename(folder)
    info, own = look(file_of("sdxl"), base=str(folder)), look(folder)
    assert own.requested.num_inference_steps < 10
    assert info.requested == own.requested
    assert info.name == str(file_of("sdxl"))
