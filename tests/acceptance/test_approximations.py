"""Approximations as their users ask for them: by flag, by variable, by the team's model configuration."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.acceptance import product
from tests.contract.database_suite import SqliteBackend
from text2img.demo.judge import judge
from text2img.demo.scenes import Scene
from text2img.engine.devices import suppress_warnings

TINY = str(product.ROOT / "training" / "tiny_autoencoder")
JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
SCENE = Scene("large", "red", "circle", "white")


def _enqueue(folder):
    (folder / "prompts.json").write_text(json.dumps([{"id": 1, "text": SCENE.caption, "seed": 7}]))
    added = product.run("enqueue", *JOB[:2], "prompts.json", folder=folder)
    assert added.returncode == 0, added.stderr


def _picture(folder):
    with Image.open(folder / "pictures" / "1.png") as image:
        image.load()
    return image, json.loads(image.text["parameters"])


def test_asked_for_by_flag_and_variable(tmp_path):
    """Both at once draw the right picture, and prompt, result and PNG say what was on."""
    _enqueue(tmp_path)
    quick = ("--num-inference-steps", "10", "--guidance-scale", "3")
    finished = product.run("run", *JOB, *quick, "--feature_cache", "3", folder=tmp_path, AUTOENCODER=TINY)
    assert finished.returncode == 0, finished.stderr
    image, parameters = _picture(tmp_path)
    assert judge(image).shows(SCENE)
    on = {"feature_cache": 3, "autoencoder": TINY}
    database = SqliteBackend(tmp_path)
    prompt, result = database.get(1), database.get(1, "dataset_records", "dataset_id")
    assert prompt["status"] == "completed"
    for told in (parameters, prompt["used"], result):
        assert on.items() <= told.items()


@pytest.mark.models
def test_asked_for_by_the_model_configuration(tmp_path):
    """The configuration's are used with its own model; a flag beats its feature cache, to switch it off."""
    _enqueue(tmp_path)
    fields = {"model_path": str(product.MODEL), "num_inference_steps": 10, "feature_cache": 4}
    database = SqliteBackend(tmp_path)
    database.put({"_id": "fast", **fields, "autoencoder": TINY}, "model_configs")
    finished = product.run("run", *JOB[:4], "--feature-cache", "0", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    _, parameters = _picture(tmp_path)
    assert parameters["autoencoder"] == TINY
    assert "feature_cache" not in parameters


def test_a_feature_cache_that_cannot_be(tmp_path):
    """A model without a UNet, or a number out of range, is status 2 before anything is claimed."""
    with suppress_warnings():
        from tests.engine import models

        models.save("sd3", tmp_path / "sd3")
    _enqueue(tmp_path)
    before = SqliteBackend(tmp_path).get(1)
    job = (*JOB[:4], "--model-id", "sd3")
    refused = product.run("run", *job, "--feature-cache", "3", folder=tmp_path)
    assert refused.returncode == 2
    assert "leave out --feature-cache" in product.errors(refused)[-1]
    wrong = product.run("run", *job, "--feature-cache", "-1", folder=tmp_path)
    assert wrong.returncode == 2
    assert "--feature-cache (FEATURE_CACHE)" in product.errors(wrong)[-1]
    assert SqliteBackend(tmp_path).get(1) == before
