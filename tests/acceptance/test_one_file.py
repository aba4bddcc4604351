"""``--model-id FILE.safetensors``, ``--model-base`` and ``--variant``: what is drawn and recorded."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.acceptance import product
from tests.contract.database_suite import SqliteBackend
from tests.engine import original
from text2img.demo.judge import judge
from text2img.demo.scenes import Scene

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--device", "cpu")
QUICK = ("--num-inference-steps", "10", "--guidance-scale", "3", "--input-file", "prompts.json")
SCENE = Scene("large", "red", "circle", "white")
MODEL = product.MODEL


def part(name, stem):
    """One component of the demo's model, as far as its names are concerned."""
    config = json.loads((MODEL / name / "config.json").read_text())
    weights = load_file(MODEL / name / f"{stem}.safetensors")
    return SimpleNamespace(config=SimpleNamespace(**config), state_dict=lambda: weights)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The demo's model in one file, in the names of Stable Diffusion 1."""
    pipe = SimpleNamespace(
        unet=part("unet", "diffusion_pytorch_model"),
        vae=part("vae", "diffusion_pytorch_model"),
        text_encoder=part("text_encoder", "model"),
    )
    return original.write(tmp_path_factory.mktemp("file") / "demo.safetensors", original.sd1(pipe))


@pytest.fixture
def variants(tmp_path):
    """The demo's model with two variants of its UNet and no plain one."""
    folder = shutil.copytree(MODEL, tmp_path / "variants")
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(whole, whole.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    whole.rename(whole.with_name("diffusion_pytorch_model.fp16.safetensors"))
    return folder


def picture(folder):
    with Image.open(folder / "pictures" / "1.png") as image:
        image.load()
    return image, json.loads(image.text["parameters"])


def test_one_file_and_variants_as_commands(file, variants, tmp_path):
    """The file draws the right image and says what lent the rest; doctor lists which is which, and takes a
    variant. No base, a pickle and a variant that is not asked for are status 2, before anything is claimed.
    """
    one = ("--model-id", str(file), "--model-base", str(MODEL))
    commands = {
        "file": ("run", *JOB, *QUICK, *one),
        "doctor": ("doctor", *JOB, *one),
        "variant": ("doctor", *JOB, "--model-id", str(variants), "--variant", "fp16"),
        "no base": ("run", *JOB, *QUICK, "--model-id", str(file)),
        "pickle": ("run", *JOB, *QUICK, "--model-id", "demo.ckpt", "--model-base", str(MODEL)),
        "no variant": ("run", *JOB, *QUICK, "--model-id", str(variants)),
    }
    for number in range(len(commands)):
        (tmp_path / "w" / str(number)).mkdir(parents=True)
        prompts = [{"id": 1, "text": SCENE.caption, "seed": 7}]
        (tmp_path / "w" / str(number) / "prompts.json").write_text(json.dumps(prompts))
    done = dict(zip(commands, product.run_each([*commands.values()], tmp_path / "w"), strict=True))
    at = {name: tmp_path / "w" / str(number) for number, name in enumerate(commands)}
    ended = {name: each.returncode for name, each in done.items() if "doctor" not in commands[name]}
    assert ended == {"file": 0, "no base": 2, "pickle": 2, "no variant": 2}, done

    image, parameters = picture(at["file"])
    assert judge(image).shows(SCENE)
    database = SqliteBackend(at["file"])
    used, result = database.get(1)["used"], database.get(1, "dataset_records", "dataset_id")
    for told in (parameters, used, result):
        assert {"model": str(file), "model_base": str(MODEL)}.items() <= told.items()

    line, variant = (
        next(line for line in done[name].stdout.splitlines() if line.startswith("model "))
        for name in ("doctor", "variant")
    )
    assert variant.startswith(f"model     ok      {variants}, 128×128")
    assert f"from {MODEL}: scheduler, tokenizer" in line
    assert f"from {file}: text_encoder, unet, vae" in line

    for name, says in (
        (
            "no base",
            "a Stable Diffusion 1 model without configuration and tokenizers; give a whole model",
        ),
        ("pickle", "demo.ckpt is a pickle"),
        ("no variant", "only the variants fp16, non_ema; ask for one of them with --variant (VARIANT)"),
    ):
        assert says in done[name].stderr, name
        prompt = SqliteBackend(at[name]).get(1)
        assert (prompt["status"], prompt.get("claim_number")) == ("pending", None), name
