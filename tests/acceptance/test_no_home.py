"""A user without a home directory and without a name, as containers with a user of their own make it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.acceptance import product

NAMELESS = """
import pwd, runpy, sys

def nameless(uid):
    raise KeyError(uid)

pwd.getpwuid = nameless
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RUN = ("run", "--database", "sqlite:///prompts.db", "--output", "pictures", "--log-format", "text")


def homeless(*arguments: str, folder, **variables: str):
    """Run the product as a user of whom nothing is known, without HOME."""
    environment = product.environment(folder, **variables)
    del environment["HOME"]
    return subprocess.run(
        [sys.executable, "-c", NAMELESS, *product.sleeping.command(*arguments)[1:]],
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=product.HANG,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    product.add(tmp_path, "a cat")
    return tmp_path


def test_a_run_that_needs_no_cache_needs_no_home(folder) -> None:
    """With LoRAs of a folder, too, nothing is kept in a home directory, and none is made up."""
    done = homeless(*RUN, "--lora-source", "./loras", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("completed 1")
    assert not (folder / "~").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--lora-source", "hub:"), "--lora-cache (LORA_CACHE)"),
        (("--lora-source", "https://loras.example/"), "--lora-cache (LORA_CACHE)"),
        (("--lora-source", "~/loras"), "--lora-source (LORA_SOURCE)"),
        (("--model-id", "s3://models/sd15"), "--model-cache (MODEL_CACHE)"),
        (("--model-id", "~/sd15"), "--model-id"),
        (("--model-id", "owner/model"), "HF_HOME"),
        (("--evaluator", "clip"), "HF_HOME"),
        (("--output", "~/pictures"), "--output (OUTPUT_URL)"),
    ],
)
def test_where_a_home_is_needed_the_option_is_named(folder, options, named) -> None:
    """Wrong usage, in one line, before anything is claimed."""
    done = homeless(*RUN, *options, folder=folder)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (folder / "~").exists()


def test_a_cache_that_is_named_needs_no_home(folder) -> None:
    """The options that the message names are enough."""
    named = ("--lora-source", "hub:", "--lora-cache", "cache")
    assert homeless(*RUN, *named, folder=folder).returncode == 0
    assert homeless(*RUN, "--lora-source", "hub:", folder=folder, XDG_CACHE_HOME="cache").returncode == 0
