"""Models that are not Stable Diffusion: refused before a claim, or called as their pipeline wants it."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing

import pytest

from tests.acceptance import product
from tests.acceptance.product import sleeping

RUN = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--num-inference-steps", "2")


def _model(folder, **index):
    """Return a copy of the demo's model whose index has these values as well, and a transformer."""
    model = shutil.copytree(product.MODEL, folder / "model")
    (model / "unet").rename(model / "transformer")
    file = model / "model_index.json"
    content = json.loads(file.read_text())
    content["transformer"] = content.pop("unet")
    file.write_text(json.dumps(content | index))
    return str(model)


def _rows(folder):
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        found = database.execute("select _id, status, error, used from datasets").fetchall()
    return {name: (status, error, json.loads(used or "{}")) for name, status, error, used in found}


@pytest.mark.parametrize(
    ("pipeline", "why"),
    [
        ("FluxKontextPipeline", "FluxKontextPipeline needs an image beside the text"),
        ("HeliosPipeline", "HeliosPipeline makes videos, not images"),
        ("StableDiffusionControlNetPipeline", "needs a control image beside the text"),
    ],
)
def test_a_pipeline_that_does_not_draw_from_text(tmp_path, pipeline, why):
    """``run``, its dry run and ``doctor`` say what it is, with status 2, and no prompt is touched."""
    model = _model(tmp_path, _class_name=pipeline)
    product.add(tmp_path, {"id": "a", "text": "a cat"})
    for arguments in (("run", "--dry-run"), ("doctor",), ("run",)):
        done = sleeping.run(*arguments, *RUN, "--model-id", model, folder=tmp_path)
        assert done.returncode == 2, done.stderr
        assert why in done.stdout + done.stderr
    assert _rows(tmp_path)["a"][0] == "pending"


def test_a_model_that_takes_neither_guidance_nor_negative_prompts(tmp_path):
    """A prompt's own are refused; the run's are left out, recorded as such, and counted in the last line."""
    model = _model(tmp_path, _class_name="Flux2KleinPipeline", is_distilled=True)
    prompts = {"negative": {"negative_prompt": "dogs"}, "guidance": {"guidance_scale": 4}, "plain": {}}
    product.add(tmp_path, *({"id": name, "text": "a cat", **own} for name, own in prompts.items()))
    options = ("--model-id", model, "--negative-prompt", "bad", "--guidance-scale", "7", "--width", "64")
    plan = sleeping.run("run", "--dry-run", *RUN, *options, folder=tmp_path)
    assert "negative would fail: negative_prompt has no effect with this model" in plan.stdout
    assert "2 steps, no guidance" in plan.stdout
    done = sleeping.run("run", *RUN, *options, "--height", "64", folder=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "1 without their negative prompt, which has no effect" in done.stdout
    rows = _rows(tmp_path)
    assert {name: row[0] for name, row in rows.items()} == {
        "negative": "error",
        "guidance": "error",
        "plain": "completed",
    }
    assert "guidance_scale has no effect" in rows["guidance"][1]
    used = rows["plain"][2]
    assert (used["negative_prompt"], used["guidance_scale"]) == ("", None)


def test_defaults_are_those_of_the_pipeline(tmp_path):
    """A model gets the defaults of its own call, a guidance of 3.5 here, and ``doctor`` says whose it is."""
    model = _model(tmp_path, _class_name="AuraFlowPipeline")
    found = sleeping.run("doctor", *RUN[:4], "--model-id", model, folder=tmp_path)
    assert "1024×1024, 50 steps, guidance 3.5 (the pipeline's own)" in found.stdout
