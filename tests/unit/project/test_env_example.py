"""``.env.local.example`` against the options: each has its lines, and the file as it is changes nothing."""

from __future__ import annotations

import os
import re

import pytest

from tests.env_example import PATH, lines, updated
from text2img.settings import options
from text2img.settings.loader import load

EXAMPLE = PATH.read_text(encoding="utf-8")
LINES = EXAMPLE.splitlines()
SET_UP = [line.lstrip("#") for line in LINES if line[:2] != "# " and line[:2] != "##" and "=" in line]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, and an environment without any option."""
    monkeypatch.chdir(tmp_path)
    for option in options():
        for name in (option.variable, *option.also):
            monkeypatch.delenv(name, raising=False)
    for name in list(os.environ):
        if name.startswith(("AWS_", "GOOGLE_", "HF_")):
            monkeypatch.delenv(name)
    return tmp_path


def test_each_option_is_explained() -> None:
    """Each has its lines, in words and values of the code; ``python -m tests.env_example`` writes them."""
    assert updated(EXAMPLE) == EXAMPLE
    assert all(f"\n{lines(option)}\n" in EXAMPLE for option in options())


def test_nothing_else_is_in_the_file() -> None:
    """Beside the options there are the variables of libraries, each once and each with a comment above."""
    names = [line.partition("=")[0] for line in SET_UP]
    rest = set(names) - {option.variable for option in options()}
    assert len(names) == len(set(names))
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS"} <= rest
    assert all(
        LINES[number - 1].startswith("# ") for number, line in enumerate(LINES) if line.lstrip("#") in SET_UP
    )


def test_a_copy_changes_nothing(folder) -> None:
    """The file as it is, and with every default of an option set, gives the settings of no file."""
    default, before = load({}), dict(os.environ)
    (folder / ".env.local").write_text(EXAMPLE)
    assert load({}) == default
    variables = {option.variable for option in options()}
    (folder / ".env.local").write_text(
        "\n".join(line for line in SET_UP if line.partition("=")[0] in variables)
    )
    assert load({}) == default
    assert dict(os.environ) == before


def test_what_is_filled_in_counts(folder, monkeypatch) -> None:
    """Options and libraries alike get the values; the environment's own value wins over the file's."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-north-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "")
    filled = {
        "RABBITMQ_HOST": "broker",
        "S3_BUCKET": "pictures",
        "RUN_ID": "night",
        "LOG_LEVEL": "Warn",
        "INTERNAL_API_TOKEN": "t",
        "FAL_AI_API_KEY": "f",
        "GEMINI_API_KEY": "g",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "key",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    text = EXAMPLE
    for name, value in filled.items():
        lines = [line for line in text.splitlines() if line.lstrip("#").startswith(f"{name}=")]
        assert len(lines) == 1, name
        text = text.replace(f"\n{lines[0]}\n", f"\n{name}={value}\n")
    (folder / ".env.local").write_text(text)
    settings = load({})
    assert (settings.broker_url, settings.output_url) == ("amqp://broker", "s3://pictures/generated")
    assert (settings.run_id, settings.log_level) == ("night", "WARNING")
    assert (settings.callback_token, settings.fal_ai_api_key, settings.gemini_api_key) == ("t", "f", "g")
    assert [os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")] == ["id", "key"]
    assert os.environ["AWS_DEFAULT_REGION"] == "eu-north-1"


def test_other_variables_of_the_file_stay_out_of_the_environment(folder) -> None:
    """A file in the working directory sets no variable that changes how programs are found or loaded."""
    (folder / ".env").write_text("PATH=/evil\nLD_PRELOAD=/evil.so\nPYTHONPATH=/evil\nAWSX=1\nMYHF_HOME=/x\n")
    before = dict(os.environ)
    load({})
    assert dict(os.environ) == before


MONGO = {"MONGO_URI": "mongodb://h"}


@pytest.mark.parametrize(
    ("file", "environment", "named"),
    [
        ("OUTPUT_URL=out", {"S3_BUCKET": "pictures"}, ["OUTPUT_URL of .env", "S3_BUCKET of the env"]),
        ("GCS_BUCKET=pics", {"OUTPUT_DIR": "d"}, ["GCS_BUCKET of .env", "OUTPUT_DIR of the env"]),
        ("OUTPUT_DIR=d", {"OUTPUT_URL": "o", **MONGO}, ["OUTPUT_DIR of .env", "MONGO_URI", "OUTPUT_URL"]),
        ("RABBITMQ_HOST=h", {"RABBITMQ_URL": "amqp://h"}, ["RABBITMQ_HOST of .env", "RABBITMQ_URL"]),
        ("OUTPUT_URL=out", {"OUTPUT_URL": "other"}, []),
        ("OUTPUT_URL=out", MONGO, []),
    ],
)
def test_a_variable_without_effect_is_noted(folder, monkeypatch, file, environment, named) -> None:
    """One in a file beside an exported one of another name for the same thing; a flag needs no note."""
    (folder / ".env").write_text(file)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notes: list[str] = []
    load({}, notes=notes)
    assert len(notes) == bool(named)
    assert all(word in notes[0] for word in named)
    notes.clear()
    load({"output": "o", "database": "sqlite:///x", "rabbitmq_url": "amqp://x"}, notes=notes)
    assert notes == []


def test_kubernetes_sets_no_other_variable_of_ours() -> None:
    """For a Service NAME it sets NAME_PORT, NAME_SERVICE_HOST and the like; METRICS_PORT is handled."""
    ending = re.compile(r"_(PORT|SERVICE_PORT|SERVICE_HOST)(_\w+)?$")
    variables = {name for option in options() for name in (option.variable, *option.also)}
    assert {name for name in variables if ending.search(name)} == {"METRICS_PORT"}
