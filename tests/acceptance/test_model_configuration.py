"""The team's model configuration in MongoDB: read, obeyed, and refused when it is wrong."""

from __future__ import annotations

import uuid

import pytest
from pymongo import MongoClient

from tests.acceptance import product
from tests.acceptance.product import sleeping

CAPTION = "a large red circle on a white background"


@pytest.fixture
def database(mongodb_server):
    """An empty database, with its URI."""
    with MongoClient(f"{mongodb_server}/configured_{uuid.uuid4().hex[:8]}") as client:
        database = client.get_default_database()
        database.uri = f"{mongodb_server}/{database.name}"
        database.datasets.insert_one({"_id": 1, "text": CAPTION})
        yield database


def _configure(database, **fields):
    model = {"model_type": "stable_diffusion", "model_path": str(product.MODEL)}
    database.model_configs.insert_one({"_id": 5, **model, **fields})


def test_a_configuration_is_obeyed_where_nobody_wishes_otherwise(database, tmp_path):
    """The configuration's parameters beat the defaults; a variable beats the configuration."""
    _configure(database, num_inference_steps=3, guidance_scale=4, scheduler="euler")
    finished = sleeping.run(
        "--mongo_uri", database.uri, "--output", "pictures", "--model_config_id", "5",
        folder=tmp_path, GUIDANCE_SCALE="2.5",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    used = database.datasets.find_one({"_id": 1})["used"]
    assert (used["num_inference_steps"], used["guidance_scale"], used["scheduler"]) == (3, 2.5, "euler")
    assert used["model"] == str(product.MODEL)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_inference_step": 3}, "did you mean num_inference_steps?"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"scheduler": "ddim2"}, "scheduler"),
        ({"safety_checker": "no"}, "safety_checker"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_is_claimed(database, tmp_path, fields, named):
    """An unknown or impossible field is one line with its name, status 2, and the prompt is untouched."""
    _configure(database, **fields)
    finished = product.run("--mongo-uri", database.uri, "--output", "pictures", folder=tmp_path)
    assert finished.returncode == 2, finished.stderr
    assert named in product.errors(finished)[-1]
    assert database.datasets.find_one({"_id": 1}) == {"_id": 1, "text": CAPTION}


def test_a_configuration_that_is_not_there(database, tmp_path):
    """An id of no configuration is a mistake of whoever named it: status 2."""
    arguments = ("--mongo-uri", database.uri, "--output", "pictures", "--model-config-id", "nobody")
    finished = product.run(*arguments, folder=tmp_path)
    assert finished.returncode == 2
    assert "nobody" in product.errors(finished)[-1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lora": {"path": "/x.safetensors"}}, "the model configuration's LoRA cannot be used: "),
        ({"scheduler": "lcm", "num_inference_steps": 51}, "the run's own parameters do not fit the model: "),
        ({"artist_name": "北"}, "the run's own signature cannot be drawn: "),
    ],
)
def test_doctor_finds_what_a_run_would_refuse(database, tmp_path, fields, said):
    """What no picture could be made with is in doctor's line of the pictures as in the run's last one."""
    _configure(database, **fields)
    job = ("--mongo-uri", database.uri, "--output", "pictures")
    found = product.run("doctor", *job, folder=tmp_path)
    refused = product.run(*job, folder=tmp_path)
    assert f"\nimages    FAILED  {said}" in found.stdout
    assert said in product.errors(refused)[-1]
    assert found.returncode == refused.returncode == 2


def test_doctor_says_what_pictures_would_be(database, tmp_path):
    """Size, steps and guidance, where prompts ask for nothing else."""
    _configure(database, num_inference_steps=3, guidance_scale=4, aspect_ratio="1:2")
    found = product.run("doctor", "--mongo-uri", database.uri, "--output", "pictures", folder=tmp_path)
    assert "\nimages    ok      128×256, 3 steps, guidance 4\n" in found.stdout
