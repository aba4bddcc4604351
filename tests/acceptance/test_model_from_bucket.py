"""``--model-id gs://…`` and ``s3://…`` as a process: pictures, one download for several, a kill in it."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from contextlib import closing

import pytest
from PIL import Image

from tests.acceptance import product
from tests.acceptance.product import sleeping
from tests.servers.models import depot
from text2img.demo.judge import judge

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--device", "cpu")
QUICK = ("--num-inference-steps", "10", "--guidance-scale", "3")
PROMPTS = [
    {"id": f"p{n}", "text": f"a large {c} circle on a white background"}
    for n, c in enumerate(("red", "blue"))
]


@pytest.fixture
def there(request, tmp_path):
    """The demo model in a bucket, and two prompts in a database."""
    server = request.getfixturevalue({"gs": "gcs_server", "s3": "s3_server"}[request.param])
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    assert product.run("enqueue", *JOB[:2], "prompts.json", folder=tmp_path).returncode == 0
    with depot(request.param, server) as found:
        yield found


def column(folder, table, name):
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        return [value for (value,) in database.execute(f"SELECT {name} FROM {table}")]  # noqa: S608


def copies(folder):
    return [each for each in folder.glob(".cache/text2img/models/*/*") if each.is_dir()]


def check_pictures(folder, url):
    """Each shows its own colour, and says which model and which revision of it drew it."""
    for prompt, colour in zip(PROMPTS, ("red", "blue"), strict=True):
        with Image.open(folder / "pictures" / f"{prompt['id']}.png") as image:
            assert judge(image).colour == colour
            assert url in image.text["parameters"]
            assert copies(folder)[0].name in image.text["parameters"]


@pytest.mark.parametrize("there", ["s3"], indirect=True)
def test_pictures_by_a_model_from_a_bucket(there, tmp_path):
    """The run fetches the model, draws in the right colours, and writes down where the model is from."""
    finished = product.run(*JOB, *QUICK, "--model-id", there.url, folder=tmp_path, **there.variables)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("completed 2, failed 0, remaining 0")
    check_pictures(tmp_path, there.url)
    assert column(tmp_path, "dataset_records", "model") == [there.url] * 2


def started(folder, there, **more):
    """A run that begins to need the model, without its last line read."""
    arguments = (*JOB, *QUICK, "--model-id", there.url, "--limit", "1")
    environment = product.environment(folder, **there.variables, **more)
    return subprocess.Popen(
        sleeping.command(*arguments),
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process, words):
    """Read the log until a line holds the words."""
    for line in process.stderr:
        if words in line:
            return
    pytest.fail(f"the process ended without saying {words!r}")


@pytest.mark.parametrize("there", ["gs"], indirect=True)
def test_one_fetches_and_the_others_wait_and_take_over(there, tmp_path):
    """Of three workers one fetches; it is killed in the midst, the next takes over, one finds its copy."""
    there.tap.open.clear()
    first = started(tmp_path, there)
    assert there.tap.reached.wait(60)
    others = [started(tmp_path, there) for _ in range(2)]
    for other in others:
        said(other, "another process fetches this model")
    assert column(tmp_path, "datasets", "status") == ["pending"] * 2, "nothing is claimed before it is there"
    first.kill()
    first.communicate()
    assert not [each for each in copies(tmp_path) if not each.name.startswith("part-")]
    del there.tap.read[:]
    there.tap.open.set()
    outputs = [other.communicate() for other in others]
    assert [other.returncode for other in others] == [0, 0], outputs
    assert sum("fetching 10 files of a model" in errors for _, errors in outputs) == 1
    weights = [name for name in there.tap.read if name.endswith("unet/diffusion_pytorch_model.safetensors")]
    assert len(weights) == 1, "one download"
    assert column(tmp_path, "datasets", "status") == ["completed"] * 2
    assert len(copies(tmp_path)) == 1
    check_pictures(tmp_path, there.url)


@pytest.mark.parametrize("there", ["s3"], indirect=True)
def test_what_a_bucket_s_failure_costs(there, tmp_path):
    """A folder that is not there is status 2, a bucket that fails 1: one line, nothing claimed."""
    for url, answer, status in ((f"{there.url}-none", None, 2), (there.url, 403, 1)):
        there.tap.status = answer
        finished = product.run(*JOB, "--model-id", url, folder=tmp_path, **there.variables)
        assert finished.returncode == status, finished.stderr
        lines = [json.loads(line) for line in product.errors(finished)]
        (error,) = [line["message"] for line in lines if line["severity"] == "ERROR"]
        assert url in error
    assert column(tmp_path, "datasets", "status") == ["pending"] * 2
    assert column(tmp_path, "datasets", "claim_number") == [None] * 2


@pytest.mark.parametrize("there", ["gs"], indirect=True)
def test_a_signal_while_the_model_is_fetched(there, tmp_path):
    """SIGTERM while the bucket holds a file back: status 143 by itself, and nothing was claimed."""
    there.tap.open.clear()
    process = started(tmp_path, there)
    assert there.tap.reached.wait(60)
    process.terminate()
    _, errors = process.communicate()
    assert (process.returncode, "grace period" in errors) == (143, False), errors
    assert column(tmp_path, "datasets", "claim_number") == [None] * 2
