"""Tiny models on disk, engines on the CPU, and requests for them."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from text2img.engine import EngineOptions
from text2img.engine.devices import silence_libraries, suppress_warnings
from text2img.engine.diffusers import DiffusersEngine
from text2img.prompts import Claim, Parameters, Prompt, PromptId, Request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a family's tiny model, written once; nobody may change it."""
    with suppress_warnings():
        silence_libraries()
        from tests.engine import models, modern

    root = tmp_path_factory.mktemp("tiny")
    builders = models.FAMILIES | modern.FAMILIES

    def folder(family: str) -> Path:
        path = root / family
        with suppress_warnings():
            if not path.exists():
                builders[family]().save_pretrained(path)
        return path

    return folder


@pytest.fixture
def copy(tiny, tmp_path) -> Callable[[str], Path]:
    """A copy of a tiny model that the test may break."""

    def copied(family: str) -> Path:
        return shutil.copytree(tiny(family), tmp_path / family)

    return copied


@pytest.fixture(scope="session")
def loaded(tiny) -> Callable[[str], DiffusersEngine]:
    """A loaded engine of the family, on the CPU in fp32, shared: nobody may change it."""
    engines = {}

    def engine(family: str) -> DiffusersEngine:
        if family not in engines:
            engines[family] = open_engine(tiny(family))
        return engines[family]

    return engine


def open_engine(folder: Path, **options) -> DiffusersEngine:
    engine = DiffusersEngine(EngineOptions(model=str(folder), **{"device": "cpu", **options}))
    engine.load()
    return engine


def look(folder: Path, **options):
    """The card of a folder's model, by inspection alone."""
    return DiffusersEngine(EngineOptions(model=str(folder), **{"device": "cpu", **options})).inspect()


def pipe_of(engine: DiffusersEngine):
    """The diffusers pipeline within, to plant failures in."""
    return engine._loaded.denoiser._pipe


def ask(seed: int = 0, text: str = "a cat", **wanted) -> Request:
    parameters = {
        "negative_prompt": "",
        "seed": seed,
        "num_inference_steps": 2,
        "guidance_scale": 5.0,
        "width": 64,
        "height": 64,
        "scheduler": None,
    }
    prompt = Prompt(claim=Claim(PromptId("int", str(seed)), "worker", 1), text=text)
    return Request(prompt=prompt, text=text, parameters=Parameters(**{**parameters, **wanted}))


def draw(engine: DiffusersEngine, *requests: Request, on_step=lambda _done, _of: None):
    return engine.generate([engine.prepare(request) for request in requests], on_step)


def edit(file: Path, **values) -> None:
    """Change values of a JSON file; None removes the key."""
    content = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def split_vocabulary(folder: Path) -> None:
    """Turn tokenizer.json into the vocab.json and merges.txt that older models come with."""
    whole = folder / "tokenizer.json"
    (folder / "vocab.json").write_text(json.dumps(json.loads(whole.read_text())["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    whole.unlink()
