"""Which output and database win: exactly one, that of the highest level that names one."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from text2img.cli import COMMANDS
from text2img.errors import ConfigurationError
from text2img.settings import options
from text2img.settings.loader import load
from text2img.worker import build

OUTPUTS = {"gcs_bucket": "gs://b-1/generated", "s3_bucket": "s3://b-1/generated", "output": "b-1"}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """An empty environment, in a folder without .env files."""
    monkeypatch.chdir(tmp_path)
    for name in ("MONGO_URI", "DATABASE_URL", "GCS_BUCKET", "S3_BUCKET", "OUTPUT_URL", "ACL", "PUBLIC_URLS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("OUTPUT_DIR", raising=False)


@pytest.mark.parametrize(("name", "url"), OUTPUTS.items())
def test_each_output_is_enough(name, url):
    """Each of the three says where pictures go; the two short ones mean the prefix ``generated``."""
    assert load({name: "b-1"}).output_url == url


@pytest.mark.parametrize("one", OUTPUTS)
def test_two_outputs_are_one_too_many(one):
    """Two are refused, by name, and so is none."""
    for other in OUTPUTS.keys() - {one}:
        with pytest.raises(ConfigurationError, match="give only one of them"):
            _ = load({one: "b-1", other: "b-2"}).output_url
    with pytest.raises(ConfigurationError, match=r"none of .*--s3-bucket \(S3_BUCKET\)"):
        _ = load({}).output_url


@pytest.mark.parametrize(("name", "url"), OUTPUTS.items())
def test_a_flag_beats_the_variables_of_the_others(monkeypatch, name, url):
    """Whatever the environment says of the other two."""
    for variable in ("GCS_BUCKET", "S3_BUCKET", "OUTPUT_URL"):
        monkeypatch.setenv(variable, "elsewhere")
    assert load({name: "b-1"}).output_url == url


LEVELS = ("flag", "environment", ".env.local", ".env")


def _said(levels, monkeypatch):
    """The settings where each level says its variables: a dict of variables by level."""
    for level, variables in levels.items():
        if level.startswith("."):
            Path(level).write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        elif level == "environment":
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
    options = {"MONGO_URI": "mongo_uri", "DATABASE_URL": "database", "OUTPUT_URL": "output"}
    flags = levels.get("flag", {})
    return load({options.get(name, name.lower()): value for name, value in flags.items()})


@pytest.mark.parametrize(("high", "low"), [*combinations(LEVELS, 2)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_higher_level_wins_in_either_spelling(monkeypatch, high, low, turned):
    """Flag, environment, ``.env.local``, ``.env``: the first that names an output has the say."""
    one, other = ("MONGO_URI", "S3_BUCKET"), ("DATABASE_URL", "OUTPUT_URL")
    one, other = (other, one) if turned else (one, other)
    said = {high: dict.fromkeys(one, "high"), low: dict.fromkeys(other, "low")}
    settings = _said(said, monkeypatch)
    assert settings.database_url == "high"
    assert "high" in settings.output_url


@pytest.mark.parametrize("level", LEVELS)
def test_two_at_one_level_are_one_too_many(monkeypatch, level):
    """Whoever says it in two ways in one place is asked which is meant, whatever stands in lower places."""
    lower = {each: {"GCS_BUCKET": "low"} for each in LEVELS[LEVELS.index(level) + 1 :]}
    settings = _said({level: {"S3_BUCKET": "a-b", "OUTPUT_URL": "c"}, **lower}, monkeypatch)
    with pytest.raises(ConfigurationError, match=r"--s3-bucket .* and --output .* are given"):
        _ = settings.output_url


def test_a_secrets_file_counts_as_the_level_that_names_it(monkeypatch, tmp_path):
    """A file named in ``.env.local`` beats the other spelling in ``.env``, and none is read for nothing."""
    (tmp_path / "uri").write_text("high\n")
    local, plain = {"DATABASE_URL_FILE": str(tmp_path / "uri")}, {"MONGO_URI": "low"}
    assert _said({".env.local": local, ".env": plain}, monkeypatch).database_url == "high"
    unread = {"MONGO_URI_FILE": "/no/such/file"}
    assert _said({"environment": {"DATABASE_URL": "b"}, ".env": unread}, monkeypatch).database_url == "b"


@pytest.mark.parametrize(
    ("flags", "variable", "wanted"),
    [
        ({}, "", False),
        ({}, "1", True),
        ({}, "true", True),
        ({"public_urls": "true"}, "0", True),
        ({"public_urls": "false"}, "yes", False),
    ],
)
def test_a_switch_is_a_flag_or_a_variable(monkeypatch, flags, variable, wanted):
    """``--public-urls`` alone says yes (the parser gives "true"); PUBLIC_URLS says either; the flag wins."""
    monkeypatch.setenv("PUBLIC_URLS", variable)
    assert load(flags).public_urls is wanted


def test_a_folder_for_all_of_it_beats_lower_levels_and_yields_to_higher(monkeypatch, tmp_path):
    """It names both a database and an output: a flag beats both variables, both flags beat its variable. Only
    one of them beside it is a question.
    """
    low = {"MONGO_URI": "low", "GCS_BUCKET": "low"}
    settings = _said({"flag": {"OUTPUT_DIR": "out"}, "environment": low}, monkeypatch)
    assert (settings.database_url, settings.output_url) == (f"sqlite:///{tmp_path}/out/text2img.db", "out")
    lower = {"environment": {"MONGO_URI": "high", "OUTPUT_URL": "high"}, ".env": {"OUTPUT_DIR": "out"}}
    monkeypatch.delenv("GCS_BUCKET")
    settings = _said(lower, monkeypatch)
    assert (settings.database_url, settings.output_url, settings.folders) == ("high", "high", False)
    monkeypatch.delenv("OUTPUT_URL")
    with pytest.raises(ConfigurationError, match=r"--mongo-uri .* and --output-dir .* are given"):
        _ = load({}).database_url


def test_any_name_of_a_folder_is_that_folder(tmp_path):
    """What means something in a URL stands for itself; what cannot be a folder here is said."""
    odd = tmp_path / "100%25 a?b#c"
    settings = load({"output_dir": str(odd)})
    build.database(settings).close()
    assert [file.name for file in odd.glob("*.db")] == ["text2img.db"]
    for wrong in ("gs://b-1/prefix", "~nobody-of-that-name/out"):
        with pytest.raises(ConfigurationError, match="--output-dir"):
            load({"output_dir": wrong})


@pytest.mark.parametrize("command", ["enqueue", "status", "retry", "report", "compare", "doctor", "run"])
def test_every_command_that_asks_the_database_takes_the_folder(command):
    """The folder that a run was given says where its database is."""
    assert "output_dir" in {option.name for option in options() if option.group in COMMANDS[command].groups}
