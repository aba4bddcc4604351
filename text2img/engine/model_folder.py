"""A model's folder: its index, its components and their configurations. No torch, and no weights.

The layout is diffusers': ``model_index.json`` names the pipeline's class and, for each component, the
library and class that reads the folder of the component's name.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from text2img.engine.families import FAMILIES, OTHER, Family
from text2img.errors import ModelFailed

if TYPE_CHECKING:
    from collections.abc import Mapping

CHECKER: Final = ("safety_checker", "feature_extractor")


class Kind(Enum):
    """What a component is, and so which file of its folder holds its configuration."""

    MODEL = "config.json"
    SCHEDULER = "scheduler_config.json"
    TOKENIZER = "tokenizer_config.json"
    PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One part of a pipeline as ``model_index.json`` names it, with its configuration."""

    name: str
    library: str
    class_name: str
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """What it is, by its class's name."""
        return kind_of(self.class_name)

    @property
    def stem(self) -> str:
        """What the names of its weight files begin with."""
        return stem_of(self.library)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A readable model folder. ``revision`` is the commit it came from where it is the hub's."""

    path: Path
    revision: str | None
    pipeline: str
    components: Mapping[str, Component]

    @property
    def family(self) -> Family:
        """What is known of the pipeline's class."""
        return FAMILIES.get(self.pipeline, OTHER)


def kind_of(class_name: str) -> Kind:
    """What a component of that class is."""
    if class_name.endswith("Scheduler"):
        return Kind.SCHEDULER
    if "Tokenizer" in class_name:
        return Kind.TOKENIZER
    if "Processor" in class_name or class_name.endswith("FeatureExtractor"):
        return Kind.PROCESSOR
    return Kind.MODEL


def stem_of(library: str) -> str:
    """What the names of weight files begin with that are written by a component's library."""
    return "diffusion_pytorch_model" if library == "diffusers" else "model"


def read_folder(path: Path, revision: str | None, *, safety_checker: bool) -> ModelFolder:
    """Read the index and every component's configuration; without its checker if that is not wanted.

    Raises ModelFailed for anything that is missing, cannot be read, or would run code of the model's own.
    """
    index = read_json(path / "model_index.json")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise ModelFailed(
            f"{path / 'model_index.json'} names no pipeline class of diffusers; code that comes with a model"
            " is never run"
        )
    left_out = () if safety_checker else CHECKER
    listed = components_in(index).items()
    components = {name: _component(path, name, pair) for name, pair in listed if name not in left_out}
    folder = ModelFolder(path=path, revision=revision, pipeline=pipeline, components=components)
    needed = folder.family.needs + ((folder.family.denoiser,) if folder.family.denoiser else ())
    for name in needed:
        if name not in components:
            raise ModelFailed(f"{path / 'model_index.json'} lists no {name}, which {pipeline} needs")
    return folder


def components_in(index: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The components an index lists as (library, class); those it leaves empty are left out."""
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {name: (pair[0], pair[1]) for name, pair in pairs.items() if pair != [None, None]}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that must be there and hold an object, else ModelFailed."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFailed(f"{file} is missing: is this a model in diffusers' format, and whole?") from None
    except (OSError, ValueError) as exc:
        raise ModelFailed(f"{file} cannot be read as JSON; fetch the model again") from exc
    if not isinstance(content, dict):
        raise ModelFailed(f"{file} holds no JSON object; fetch the model again")
    return content


def _component(path: Path, name: str, pair: tuple[Any, Any]) -> Component:
    library, class_name = pair
    if not (isinstance(library, str) and isinstance(class_name, str) and _is_trusted(library)):
        raise ModelFailed(
            f"the model's {name} comes from {library}, not from diffusers or transformers; code that comes"
            " with a model is never run"
        )
    folder = path / name
    if not folder.is_dir():
        hint = "with safety_checker: false it is not needed" if name in CHECKER else "fetch the model again"
        raise ModelFailed(f"model_index.json lists {name}, but {folder} is missing; {hint}")
    config = _config(folder, kind_of(class_name))
    return Component(name=name, library=library, class_name=class_name, folder=folder, config=config)


def _config(folder: Path, kind: Kind) -> dict[str, Any]:
    """The component's configuration. A tokenizer can do without one: its vocabulary is what counts."""
    file = folder / kind.value
    return {} if kind is Kind.TOKENIZER and not file.exists() else read_json(file)


def _is_trusted(library: str) -> bool:
    """diffusers, transformers, or a package of diffusers' own pipelines (the safety checker's is one)."""
    if library in {"diffusers", "transformers"}:
        return True
    spec = importlib.util.find_spec("diffusers")  # finds it without importing it
    roots = spec.submodule_search_locations if spec and library.isidentifier() else None
    return any((Path(root) / "pipelines" / library / "__init__.py").is_file() for root in roots or ())
