"""What is found wrong with a model when its weights are loaded; the libraries alone would go on with most."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl
from safetensors.torch import load_file, save_file

from tests.engine.conftest import ask, draw, edit, open_engine, pipe_of, split_vocabulary
from text2img.engine import EngineOptions
from text2img.engine.devices import suppress_warnings
from text2img.engine.diffusers import DiffusersEngine
from text2img.engine.loading import check_dtypes, load_pipeline
from text2img.engine.model_folder import read_folder
from text2img.errors import ModelFailed

WEIGHTS = [
    ("sd1", "unet/diffusion_pytorch_model.safetensors"),
    ("sd1", "vae/diffusion_pytorch_model.safetensors"),
    ("sd1", "text_encoder/model.safetensors"),
    ("flux", "transformer/diffusion_pytorch_model.safetensors"),
    ("flux", "text_encoder_2/model.safetensors"),
]


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [
        ("sd1", "StableDiffusionPipeline"),
        ("sdxl", "StableDiffusionXLPipeline"),
        ("sd3", "StableDiffusion3Pipeline"),
        ("flux", "FluxPipeline"),
    ],
)
def test_families(loaded, family, pipeline):
    """Each family's folder becomes its pipeline, in fp32 on the CPU, ready to infer."""
    pipe = pipe_of(loaded(family))
    assert type(pipe).__name__ == pipeline
    assert not pipe.vae.training
    assert {weight.dtype for weight in pipe.vae.parameters()} == {torch.float32}


def test_no_watermark_of_the_library_s(tiny, monkeypatch):
    """Where invisible-watermark is installed, SDXL's pipeline would change the pixels by itself."""
    monkeypatch.setattr(pipeline_stable_diffusion_xl, "is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(pipeline_stable_diffusion_xl, "StableDiffusionXLWatermarker", object, raising=False)
    assert pipe_of(open_engine(tiny("sdxl"))).watermark is None


@pytest.mark.parametrize(("family", "file"), WEIGHTS)
def test_missing_key(copy, family, file):
    """A weight that a file lacks, which the libraries fill with random numbers, is an error."""
    path = copy(family) / file
    weights = load_file(path)
    lost = max(weights)
    del weights[lost]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelFailed, match="missing") as caught:
        open_engine(path.parent.parent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("family", "file"), WEIGHTS)
def test_unknown_key(copy, family, file):
    """A weight that the configuration does not know is an error."""
    path = copy(family) / file
    save_file({**load_file(path), "another.weight": torch.zeros(3)}, path, {"format": "pt"})
    with pytest.raises(ModelFailed, match=r"unknown, such as .*another\.weight"):
        open_engine(path.parent.parent)


def rename(path, *names):
    """Write a file's weights under the names they had in older checkpoints."""
    weights = {}
    for key, weight in load_file(path).items():
        old = key
        for now, then in names:
            old = re.sub(now, then, old)
        weights[old] = weight
    save_file(weights, path, {"format": "pt"})


def test_old_checkpoint(tmp_path):
    """A model written as SD 1.5 was, with old names, counted positions and vocab.json, draws the same."""
    from tests.engine import models

    with suppress_warnings():
        models.sd1(checked=True).save_pretrained(tmp_path)
    (expected,) = draw(open_engine(tmp_path), ask())
    text, checker = (tmp_path / name / "model.safetensors" for name in ("text_encoder", "safety_checker"))
    rename(text, ("^(?!text_model)", "text_model."))
    rename(checker, ("^vision_model", "vision_model.vision_model"))
    vae = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    attention = [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), (r"to_out\.0", "proj_attn")]
    rename(vae, *((rf"(attentions\.0)\.{now}", rf"\1.{then}") for now, then in attention))
    assert any(".query." in key for key in load_file(vae))
    for path, prefix in ((text, "text_model"), (checker, "vision_model.vision_model")):
        positions = {f"{prefix}.embeddings.position_ids": torch.arange(5)[None]}
        save_file({**load_file(path), **positions}, path, {"format": "pt"})
    split_vocabulary(tmp_path / "tokenizer")
    (old,) = draw(open_engine(tmp_path), ask())
    assert (old.pixels == expected.pixels).all()


@pytest.mark.parametrize(("family", "file"), WEIGHTS)
def test_other_shapes(copy, family, file):
    """Weights whose shapes are not those of the configuration are an error of one line."""
    path = copy(family) / file
    weights = load_file(path)
    key = max(weights)
    weights[key] = torch.zeros(*weights[key].shape, 2)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(
        ModelFailed, match=f"^the weights of the model's {path.parent.name} do not match"
    ) as caught:
        open_engine(path.parent.parent)
    assert "\n" not in str(caught.value)


def test_weights_of_another_precision(copy):
    """fp16 files are computed in fp32 where that is asked for."""
    path = copy("sd1") / "unet/diffusion_pytorch_model.safetensors"
    save_file({key: weight.half() for key, weight in load_file(path).items()}, path, {"format": "pt"})
    engine = open_engine(path.parent.parent, dtype="fp32")
    assert pipe_of(engine).unet.dtype == torch.float32


@pytest.mark.parametrize(("dtype", "expected"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("family", ["sd1", "flux"])
def test_dtype(tiny, family, dtype, expected):
    """The dtype that is asked for is that of every component, but for layers T5 keeps in fp32."""
    pipe = pipe_of(open_engine(tiny(family), dtype=dtype))
    check_dtypes(pipe.components, expected)
    assert pipe.vae.dtype == expected
    with pytest.raises(ModelFailed, match="instead of"):
        check_dtypes(pipe.components, torch.float32)


def test_dtype_as_string(tiny):
    """A dtype given as a string, which diffusers may read as fp32 without a word, is an error."""
    folder = read_folder(tiny("sd1"), None, safety_checker=True)
    variants = dict.fromkeys(folder.components)
    with suppress_warnings(), pytest.raises(ModelFailed, match=r"float32 instead of half"):
        load_pipeline(folder, variants, "cpu", "half")


def test_tokenizer_lost_after_inspection(copy):
    """A tokenizer that turns out empty once it is loaded is noticed too."""
    folder = copy("sd1")
    engine = DiffusersEngine(EngineOptions(model=str(folder), device="cpu"))
    engine.inspect()
    (folder / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(ModelFailed, match="tokenizer has 2 tokens"):
        engine.load()


def test_variant(copy):
    """The variant that is asked for is what is loaded."""
    path = copy("sd1") / "unet/diffusion_pytorch_model.safetensors"
    weights = {key: torch.zeros_like(weight) for key, weight in load_file(path).items()}
    save_file(weights, path.with_name("diffusion_pytorch_model.zero.safetensors"), {"format": "pt"})
    plain, zero = open_engine(path.parent.parent), open_engine(path.parent.parent, variant="zero")
    assert pipe_of(plain).unet.conv_in.weight.abs().sum() > 0
    assert pipe_of(zero).unet.conv_in.weight.abs().sum() == 0


def test_unknown_component_class(copy):
    """A component of a class that the installed library lacks is an error that says so."""
    folder = copy("sd1")
    edit(folder / "model_index.json", unet=["diffusers", "UNet9DModel"])
    with pytest.raises(ModelFailed, match="UNet9DModel"):
        open_engine(folder)


def test_renamed_class(tiny, tmp_path):
    """The image processor's old name, which SD 1.4's index has, is still understood."""
    from tests.engine import models

    with suppress_warnings():
        models.sd1(checked=True).save_pretrained(tmp_path)
    edit(tmp_path / "model_index.json", feature_extractor=["transformers", "CLIPFeatureExtractor"])
    engine = open_engine(tmp_path)
    assert draw(engine, ask())[0].pixels.shape == (64, 64, 3)


def test_checker_left_unloaded(tiny, tmp_path):
    """With the safety checker switched off, its weights are not even read."""
    from tests.engine import models

    with suppress_warnings():
        models.sd1(checked=True).save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "safety_checker")
    pipe = pipe_of(open_engine(tmp_path, safety_checker=False))
    assert pipe.safety_checker is None


def test_does_not_fit(copy, monkeypatch):
    """A model that the device's memory cannot hold is said not to fit, whatever the allocator raised."""
    from diffusers import UNet2DConditionModel

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(UNet2DConditionModel, "from_pretrained", full)
    with pytest.raises(ModelFailed, match="does not fit into cpu's memory"):
        open_engine(copy("sd1"))


_MEASURE = """
import sys
from pathlib import Path

import torch

from tests.engine.conftest import open_engine

def pages(name):
    status = Path("/proc/self/status").read_text()
    return int(status.partition(name)[2].split()[0]) * 1024

torch.set_num_threads(1)
open_engine(Path(sys.argv[1]))  # what the libraries take for themselves is there
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = pages("VmRSS:")
engine = open_engine(Path(sys.argv[2]))
print(pages("VmHWM:") - before)
"""


@pytest.mark.models
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux counts a process's peak")
def test_no_second_copy(tiny, tmp_path):
    """A model of 100 MB whose files are in the dtype that is asked for is mapped and not copied: loading it
    never holds half of its size.
    """
    from diffusers import UNet2DConditionModel

    from tests.engine import models

    with suppress_warnings():
        pipe = models.sd1()
        pipe.register_modules(
            unet=UNet2DConditionModel(
                block_out_channels=(128, 256),
                layers_per_block=2,
                sample_size=8,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                norm_num_groups=4,
                cross_attention_dim=models.HIDDEN,
                attention_head_dim=4,
                transformer_layers_per_block=3,
            )
        )
        pipe.save_pretrained(tmp_path / "large")
    size = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    measured = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tiny("sd1")), str(tmp_path / "large")],
        check=True,
        capture_output=True,
        text=True,
    )
    assert size > 80e6
    assert int(measured.stdout) < size / 2
