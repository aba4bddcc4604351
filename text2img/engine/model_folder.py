"""A model's folder: its index, its components and their configurations. No torch, and no weights.

The layout is diffusers': ``model_index.json`` names the pipeline's class and, for each component, the
library and class that reads the folder of the component's name.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import ModelFailed

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


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


logger = logging.getLogger(__name__)

_LONGEST_HEADER: Final = 100_000_000  # bytes; the format's own limit
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}")
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def choose_variant(names: Iterable[str], stem: str, wanted: str | None, where: str) -> str | None:
    """The set of weight files to load among a folder's file ``names``: a variant's name, or None for plain.

    ``stem`` is what such files' names begin with. A variant that is not there gives way to the plain files,
    and plain files that are not there to the only variant, with a word in the log; neither changes what is
    drawn but for rounding. Raises ModelFailed where nothing fits. ``where`` names the folder in messages.
    """
    names = list(names)
    there = _variants(names, stem)
    if wanted in there:
        return wanted
    if wanted is not None and None in there:
        logger.warning("%s has no variant %s; its plain weights are used", where, wanted)
        return None
    if wanted is None and len(there) == 1:
        (only,) = there
        logger.info("%s has no plain weights; its variant %s is used", where, only)
        return only
    raise ModelFailed(_nothing_fits(names, there, wanted, where))


def weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """The files of one set: one file, or the shards its index names.

    Raises ModelFailed where the index cannot be read or names a shard that is not there.
    """
    dot = f".{variant}" if variant else ""
    single = folder / f"{stem}{dot}.safetensors"
    index = folder / f"{stem}.safetensors.index{dot}.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelFailed(f"{folder} holds neither {single.name} nor {index.name}; fetch the model again")
    shards = sorted(set(_weight_map(index).values()))
    for name in shards:
        if not (folder / name).is_file():
            raise ModelFailed(f"{index} names {name}, which is not there; fetch the model again")
    return [folder / name for name in shards]


def check_whole(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's tensors, by name.

    Raises ModelFailed where the file is shorter or longer than its header says, or has no such header.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ModelFailed(_broken(file, f"of its {size} bytes none are a whole header"))
            header: dict[str, dict[str, list[int]]] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        ends = [tensor["data_offsets"][1] for tensor in header.values()]
        shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as exc:
        raise ModelFailed(_broken(file, "its header cannot be read")) from exc
    promised = 8 + length + max(ends, default=0)
    if size != promised:
        raise ModelFailed(_broken(file, f"it has {size} bytes and its header promises {promised}"))
    if not shapes:
        raise ModelFailed(_broken(file, "it holds no weights"))
    return shapes


def _variants(names: Iterable[str], stem: str) -> set[str | None]:
    """The variants that files named ``stem[.variant][-shard].safetensors`` belong to; None is plain."""
    pattern = re.compile(rf"{re.escape(stem)}(?:\.([A-Za-z0-9_-]+?))?\.safetensors")
    found = (pattern.fullmatch(_SHARD.sub("", name)) for name in names)
    return {match[1] for match in found if match}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(key): str(name) for key, name in weights.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
        raise ModelFailed(f"{index} cannot be read; fetch the model again") from exc
    if not names or any("/" in name or "\\" in name for name in names.values()):
        raise ModelFailed(f"{index} names no weight files of its own folder; fetch the model again")
    return names


def _nothing_fits(names: list[str], there: set[str | None], wanted: str | None, where: str) -> str:
    variants = ", ".join(sorted(name for name in there if name))
    if variants:
        missing = f"no variant {wanted} and no plain weights" if wanted else "no plain weights"
        return f"{where} has {missing}, only the variants {variants}: ask for one of them"
    if any(name.endswith(_PICKLES) for name in names):
        return (
            f"{where} has pickled weights only (such as .bin), and reading those can run code: use a model"
            " that comes as .safetensors"
        )
    return f"{where} has no weights (.safetensors); fetch the model again"


def _broken(file: Path, why: str) -> str:
    return f"{file} is truncated or no safetensors file ({why}); fetch the model again"


SHORT_NAMES: Final = {
    "DPMSolverMultistepScheduler": "dpm++",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "DDIMScheduler": "ddim",
    "UniPCMultistepScheduler": "unipc",
    "PNDMScheduler": "pndm",
    "HeunDiscreteScheduler": "heun",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
}
"""Scheduler classes that a request can name; each name has one class among the diffusion models' and may
have one among the flow-matching models'."""

DIFFUSION: Final = frozenset(name for name in SHORT_NAMES if not name.startswith("FlowMatch")) | {
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "TCDScheduler",
}
FLOW: Final = frozenset(
    {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler"}
)


@dataclass(frozen=True, slots=True)
class Family:
    """What holds for all models of one pipeline class.

    ``denoiser`` is its noise predictor's component; ``needs`` what must be listed beside it; ``flow``
    whether it was trained by flow matching, so that only such schedulers fit; ``packed`` whether latents
    come as (n, h/2·w/2, 4c); ``patch`` how many latent pixels a side one token covers; ``names`` the
    schedulers that can be asked for.
    """

    name: str
    denoiser: str
    needs: tuple[str, ...]
    names: tuple[str, ...]
    flow: bool = False
    packed: bool = False
    patch: int = 1

    def runs_with(self, scheduler: str, config: dict[str, object]) -> bool:
        """Whether the scheduler class is of the kind the model was trained for.

        A multistep solver fits a flow-matching model when it is told to solve flows.
        """
        if self.flow:
            return scheduler in FLOW or (scheduler in DIFFUSION and bool(config.get("use_flow_sigmas")))
        return scheduler in DIFFUSION and not config.get("use_flow_sigmas")


_ALL: Final = ("dpm++", "euler", "euler-a", "ddim", "unipc", "pndm", "heun", "lcm")
_SD: Final = ("vae", "scheduler", "text_encoder", "tokenizer")

FAMILIES: Final = {
    "StableDiffusionPipeline": Family("sd", "unet", _SD, _ALL),
    "StableDiffusionXLPipeline": Family("sdxl", "unet", (*_SD, "text_encoder_2", "tokenizer_2"), _ALL),
    "StableDiffusion3Pipeline": Family(
        "sd3",
        "transformer",
        (*_SD, "text_encoder_2", "tokenizer_2"),
        ("euler", "heun"),
        flow=True,
        patch=2,
    ),
    # Heun's scheduler takes no list of sigmas, and FluxPipeline always passes one.
    "FluxPipeline": Family(
        "flux",
        "transformer",
        (*_SD, "text_encoder_2", "tokenizer_2"),
        ("euler",),
        flow=True,
        packed=True,
        patch=2,
    ),
}
OTHER: Final = Family("other", "", ("scheduler",), ())


_SD_VALUES: Final = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
}
"""What Stable Diffusion was published with, for schedulers whose own defaults are others and where the
model's configuration is silent: DDIM's default would clip latents to [-1, 1]."""


class Schedulers:
    """A model's schedulers. ``own`` is the one it came with; it and its configuration are never changed."""

    def __init__(self, own: Any, *, flow: bool) -> None:
        self._own = own
        self._flow = flow
        self._made: dict[str, Any] = {}

    def get(self, name: str | None) -> Any:
        """The scheduler of that name, or with None the model's own; the same object each time.

        A scheduler forgets its last run when a pipeline sets its timesteps, so that it can be used again.
        """
        if name is None or SHORT_NAMES.get(type(self._own).__name__) == name:
            return self._own
        if name not in self._made:
            import diffusers

            scheduler = getattr(diffusers, _class_name(name, flow=self._flow))
            self._made[name] = scheduler.from_config(self._config(self._own.config))
        return self._made[name]

    def _config(self, own: Mapping[str, Any]) -> dict[str, Any]:
        return dict(own) if self._flow else {**_SD_VALUES, **own}


def _class_name(name: str, *, flow: bool) -> str:
    return next(
        class_name
        for class_name, short in SHORT_NAMES.items()
        if short == name and class_name.startswith("FlowMatch") == flow
    )
