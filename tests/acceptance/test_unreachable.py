"""What a run cannot do without: missing, it is one clear line, status 1, and nothing claimed."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.acceptance import product
from tests.servers import free_port

DATABASE = ("--database", "sqlite:///prompts.db")


@pytest.fixture
def folder(tmp_path):
    """A folder with one pending prompt."""
    product.add(tmp_path, product.SCENE)
    return tmp_path


def _failure(folder, *arguments, status=1, **variables):
    """The last line of standard error, of a run that must end with that status and leave its prompt alone."""
    finished = product.run(*arguments, folder=folder, **variables)
    assert finished.returncode == status, finished.stderr
    assert "pass-word" not in finished.stderr
    if "DEBUG" not in arguments:
        assert "Traceback" not in finished.stderr
    line = json.loads(product.errors(finished)[-1])
    assert line["severity"] == "ERROR"
    if "--database" in arguments:
        assert product.counts(folder) == {"pending": 1}
    return line["message"]


def test_no_mongodb_server(tmp_path):
    """A MongoDB server that does not answer is named with its host; its password is not."""
    port = free_port()
    uri = f"mongodb://night:pass-word@127.0.0.1:{port}/prompts?serverSelectionTimeoutMS=1000"
    loudly = ("--log-level", "DEBUG", "--log-file", "run.log")
    message = _failure(tmp_path, "--mongo-uri", uri, "--output", "pictures", *loudly)
    assert f"127.0.0.1:{port}" in message
    for text in (message, (tmp_path / "run.log").read_text()):
        assert text
        assert "pass-word" not in text


def test_no_bucket(folder, gcs_server):
    """A bucket that does not exist is named, and status 2."""
    arguments = (*DATABASE, "--gcs-bucket", "no-such-bucket", "--model-id", str(product.MODEL))
    assert "no-such-bucket" in _failure(folder, *arguments, status=2, STORAGE_EMULATOR_HOST=gcs_server.host)


def test_no_storage_server(folder):
    """A storage that nobody serves is one line."""
    host = f"http://127.0.0.1:{free_port()}"
    arguments = (*DATABASE, "--gcs-bucket", "pictures", "--model-id", str(product.MODEL))
    assert "Cloud Storage" in _failure(folder, *arguments, STORAGE_EMULATOR_HOST=host)


def test_no_model_folder(folder):
    """A model folder that is not there is named."""
    assert "no-such-model" in _failure(folder, *DATABASE, "--output", "p", "--model-id", "./no-such-model")


def test_no_hub(folder):
    """A hub that cannot be reached: the model is named, and nothing is waited for."""
    assert "somebody/some-model" in _failure(
        folder, *DATABASE, "--output", "p", "--model-id", "somebody/some-model"
    )


def test_half_a_model(folder):
    """A model whose weights were cut off in the middle is found out before anything is claimed."""
    model = folder / "model"
    shutil.copytree(product.MODEL, model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = _failure(folder, *DATABASE, "--output", "p", "--model-id", str(model))
    assert "diffusion_pytorch_model.safetensors" in message


def test_no_gpu(folder):
    """``--device cuda`` without a GPU fails at once and says how a container gets one."""
    message = _failure(folder, *DATABASE, "--output", "p", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert "--gpus all" in message


def test_a_folder_that_cannot_be_written(folder):
    """An output folder whose place is taken by a file is one line."""
    (folder / "p").write_text("a file")
    assert str(folder / "p") in _failure(folder, *DATABASE, "--output", "p", "--model-id", str(product.MODEL))


def test_doctor_names_what_is_wrong(folder):
    """``doctor`` tries everything, one line each, and ends with the status of the first failure."""
    arguments = (*DATABASE, "--output", "pictures", "--model-id", "./no-such-model")
    finished = product.run("doctor", *arguments, folder=folder)
    lines = dict(line.split(maxsplit=1) for line in finished.stdout.splitlines())
    assert finished.returncode == 1
    assert {name: verdict.split()[0] for name, verdict in lines.items()} == {
        "database": "ok", "storage": "ok", "device": "ok", "model": "FAILED", "callback": "ok",
    }  # fmt: skip
    assert [path.name for path in folder.glob("pictures/*")] == []


def test_doctor_is_content(folder):
    """With all in order, ``doctor`` ends with status 0."""
    arguments = (*DATABASE, "--output", "pictures", "--model-id", str(product.MODEL))
    finished = product.run("doctor", *arguments, folder=folder)
    assert finished.returncode == 0, finished.stdout


def test_doctor_reads_the_font_that_signs(folder):
    """Where pictures are to be signed, a line says of the font what it holds, or that it is none."""
    arguments = ("doctor", *DATABASE, "--output", "pictures", "--model-id", str(product.MODEL))
    signed = product.run(*arguments, "--artist-name", "Ana", folder=folder)
    assert (signed.returncode, len(signed.stdout.splitlines())) == (0, 7)
    assert "signature ok      DejaVuSans-Bold.ttf has 5,898 characters" in signed.stdout
    (folder / "no.ttf").write_text("no font")
    wrong = product.run(*arguments, "--signature-font", "no.ttf", folder=folder)
    assert wrong.returncode == 2
    assert "signature FAILED  the font no.ttf cannot be read: " in wrong.stdout


def test_a_run_that_fails_ends_with_its_line(folder):
    """What was done and what remains stands on standard output also where a part has failed."""
    finished = product.run(*DATABASE, "--output", "pictures", "--model-id", str(folder), folder=folder)
    assert finished.returncode == 1
    assert finished.stdout == "completed 0, failed 0, remaining 1; 0.00 images/s; pictures\n"
