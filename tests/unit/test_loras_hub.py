"""LoRAs by hub id, against a small hub of our own on loopback; each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.engine.test_hub import COMMIT, repository
from tests.unit.test_loras_fetched import weights

CODE = """
import hashlib, sys, time
from pathlib import Path
from text2img.errors import PromptFailed
from text2img.loras import Library, Sources
from text2img.loras.cache import Cache
from text2img.prompts.loras import Lora
library = Library(Sources.parse('hub:artist/'), Cache(Path(sys.argv[1]), 10**6, time.sleep), patience=0)
try:
    print(hashlib.sha256(Path(library.file(Lora(sys.argv[2], 1.0))).read_bytes()).hexdigest()[:8], 'torch' in sys.modules)
except PromptFailed as exc:
    print(exc.code, exc)
"""  # noqa: E501 - a program


def fetch(folder, endpoint, path, offline="0"):
    """What a fresh process says of the LoRA."""
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    command = [sys.executable, "-c", CODE, str(folder / "cache"), path]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.fixture
def endpoint(httpserver):
    return httpserver.url_for("").rstrip("/")


def test_a_repositorys_lora_is_fetched_once(httpserver, endpoint, tmp_path):
    """The only safetensors file, or the one that is named; nothing else, and only once for a commit; offline
    it is found again.
    """
    files = {
        "ink.safetensors": weights(),
        "README.md": b"x",
        "ink.bin": b"x",
        "sub/x.safetensors": weights(8),
    }
    fetched = repository(httpserver, "artist/ink", files)
    first = fetch(tmp_path, endpoint, "artist/ink")
    assert first.endswith(" False")
    assert fetched == ["ink.safetensors"]
    assert fetch(tmp_path, endpoint, "artist/ink") == first
    assert fetch(tmp_path, endpoint, "artist/ink", offline="1") == first
    assert fetched == ["ink.safetensors"]
    assert fetch(tmp_path, endpoint, "artist/ink/sub/x.safetensors") != first
    assert fetched == ["ink.safetensors", "sub/x.safetensors"]


def test_what_the_hub_does_not_have(httpserver, endpoint, tmp_path):
    """A repository or file that is not there, and one that leaves open which, are the prompt's failure."""
    repository(httpserver, "artist/two", {"a.safetensors": weights(), "b.safetensors": weights()})
    httpserver.expect_request("/api/models/artist/none").respond_with_json(
        {"error": "Repository not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"}
    )
    said = fetch(tmp_path, endpoint, "artist/two")
    assert said.startswith("lora_failed the LoRA cannot be fetched: its repository has 2 .safetensors files")
    assert "artist/two has no c.safetensors" in fetch(tmp_path, endpoint, "artist/two/c.safetensors")
    assert "it is not on the hub, or is private or gated" in fetch(tmp_path, endpoint, "artist/none")
    assert "--lora-source" in fetch(tmp_path, endpoint, "other/two")
    assert "no copy of it" in fetch(tmp_path, endpoint, "artist/two", offline="1")


def test_a_hub_that_cannot_be_reached_is_asked_later(tmp_path):
    """Without a network the prompt is tried again, as generation_failed."""
    said = fetch(tmp_path, "http://127.0.0.1:9", "artist/ink")
    assert said.startswith("generation_failed the LoRA cannot be fetched for the moment: the hub cannot be")
    assert COMMIT not in said
