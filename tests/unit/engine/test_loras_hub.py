"""LoRAs by hub id, against a small hub of our own on loopback; each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.engine.test_hub import COMMIT, repository
from tests.unit.engine.test_loras import weights

CODE = """
import hashlib, sys, time
from pathlib import Path
from text2img.errors import PromptFailed
from text2img.engine.loras import LoraCache, SourceAllowlist
from text2img.engine.loras.cache import Cache
from text2img.prompts.parameters import Lora
for path in sys.argv[2:]:
    cache = Cache(Path(sys.argv[1]), 10**6, time.sleep)
    library = LoraCache(SourceAllowlist.parse('hub:artist/'), cache, retry_timeout=0)
    try:
        data = Path(library.file(Lora(path, 1.0))).read_bytes()
        print(hashlib.sha256(data).hexdigest()[:8], 'torch' in sys.modules)
    except PromptFailed as exc:
        print(exc.code, exc)
"""


def fetch(folder, endpoint, *paths, offline="0"):
    """What a fresh process says of each LoRA, one after the other, each time as a run that has just begun."""
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    command = [sys.executable, "-c", CODE, str(folder / "cache"), *paths]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    said = done.stdout.splitlines()
    assert len(said) == len(paths)
    return said


@pytest.fixture
def endpoint(httpserver):
    return httpserver.url_for("").rstrip("/")


def test_a_repositorys_lora_is_fetched_once(httpserver, endpoint, tmp_path):
    """The only safetensors file, or the one that is named; nothing else, and only once for a commit; offline
    it is found again, and what was never fetched is not.
    """
    files = {
        "ink.safetensors": weights(),
        "README.md": b"x",
        "ink.bin": b"x",
        "sub/x.safetensors": weights(8),
    }
    fetched = repository(httpserver, "artist/ink", files)
    ink, named = "artist/ink", "artist/ink/sub/x.safetensors"
    first, again, other = fetch(tmp_path, endpoint, ink, ink, named)
    assert first.endswith(" False")
    assert again == first != other
    assert fetched == ["ink.safetensors", "sub/x.safetensors"]
    assert fetch(tmp_path, endpoint, ink, "artist/two", offline="1") == [
        first,
        "lora_failed the LoRA cannot be fetched: HF_HUB_OFFLINE is set and this machine has no copy of it",
    ]
    assert fetched == ["ink.safetensors", "sub/x.safetensors"]


def test_what_the_hub_does_not_have(httpserver, endpoint, tmp_path):
    """A repository or file that is not there, and one that leaves open which, are the prompt's failure."""
    repository(httpserver, "artist/two", {"a.safetensors": weights(), "b.safetensors": weights()})
    httpserver.expect_request("/api/models/artist/none").respond_with_json(
        {"error": "Repository not found"}, status=404, headers={"X-Error-Code": "RepoNotFound"}
    )
    asked = ("artist/two", "artist/two/c.safetensors", "artist/none", "other/two")
    which, file, repo, source = fetch(tmp_path, endpoint, *asked)
    assert which.startswith("lora_failed the LoRA cannot be fetched: its repository has 2 .safetensors files")
    assert "artist/two has no c.safetensors" in file
    assert "it is not on the hub, or is private or gated" in repo
    assert "--lora-source" in source


def test_a_hub_that_cannot_be_reached_is_asked_later(tmp_path):
    """Without a network the prompt is tried again, as generation_failed."""
    (said,) = fetch(tmp_path, "http://127.0.0.1:9", "artist/ink")
    assert said.startswith("generation_failed the LoRA cannot be fetched for the moment: the hub cannot be")
    assert COMMIT not in said
