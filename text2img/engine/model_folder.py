"""A model folder in diffusers' layout: index, components, weight files, families and schedulers.

``model_index.json`` names the pipeline class and, for each component, the library and class that load the
folder of the component's name. This module reads no weights and
imports torch only in ``class_of``.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from text2img.engine.schedulers import DIFFUSION, FLOW
from text2img.errors import ConfigurationError, ModelFailed, ModelUnusable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


CHECKER: Final = ("safety_checker", "feature_extractor")


class Kind(Enum):
    """A component's kind; its value is the name of the configuration file in the component's folder."""

    MODEL = "config.json"
    SCHEDULER = "scheduler_config.json"
    TOKENIZER = "tokenizer_config.json"
    PROCESSOR = "preprocessor_config.json"
    GUIDER = "guider_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One part of a pipeline as ``model_index.json`` names it, with its configuration.

    ``file`` is the single file that holds its weights; None where they are in the folder.
    """

    name: str
    library: str
    class_name: str
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None

    @property
    def kind(self) -> Kind:
        """The component's kind, by its class name."""
        return kind_of(self.class_name)

    @property
    def stem(self) -> str:
        """The prefix of its weight files' names."""
        return stem_of(self.library)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A readable model folder; ``revision`` is the commit of a model from the hub, else None.

    ``empty`` lists the components that the index names as null: the model does without them. ``flags`` are
    the other values of model_index.json, such as ``is_distilled``.
    """

    path: Path
    revision: str | None
    pipeline: str
    components: Mapping[str, Component]
    empty: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        """The family of the pipeline class; OTHER for a class that is not in FAMILIES."""
        return FAMILIES.get(self.pipeline, OTHER)

    @property
    def configs(self) -> dict[str, Mapping[str, Any]]:
        """The components' configurations, by name, each with its class as ``_class_name``."""
        return {
            name: {**component.config, "_class_name": component.class_name}
            for name, component in self.components.items()
        }


def kind_of(class_name: str) -> Kind:
    """Return the kind of a component of that class."""
    if class_name.endswith("Scheduler"):
        return Kind.SCHEDULER
    if "Tokenizer" in class_name:
        return Kind.TOKENIZER
    if "Processor" in class_name or class_name.endswith("FeatureExtractor"):
        return Kind.PROCESSOR
    if class_name.endswith("Guidance"):
        return Kind.GUIDER
    return Kind.MODEL


def stem_of(library: str) -> str:
    """Return the prefix of the weight files' names that a component's library writes."""
    return "diffusion_pytorch_model" if library == "diffusers" else "model"


def read_folder(path: Path, revision: str | None, *, safety_checker: bool) -> ModelFolder:
    """Read the index and every component's configuration, the safety checker's only if it is requested.

    Raises ModelFailed for anything that is missing, cannot be read, or would run the model's own code.
    """
    if (path / "modular_model_index.json").is_file() and not (path / "model_index.json").is_file():
        raise ModelUnusable(
            f"{path} is a modular repository, which text2img does not run; use one with a model_index.json"
        )
    index = read_json(path / "model_index.json")
    pipeline = index.get("_class_name")
    if not isinstance(pipeline, str):
        raise ModelUnusable(
            f"{path / 'model_index.json'} names no pipeline class of diffusers; code that comes with a model"
            " is never run"
        )
    excluded = () if safety_checker else CHECKER
    listed = components_in(index).items()
    components = {name: _component(path, name, pair) for name, pair in listed if name not in excluded}
    empty = tuple(name for name, value in index.items() if value == [None, None])
    flags = {name: value for name, value in index.items() if not isinstance(value, list)}
    folder = ModelFolder(
        path=path, revision=revision, pipeline=pipeline, components=components, empty=empty, flags=flags
    )
    required = folder.family.needs + ((folder.family.denoiser,) if folder.family.denoiser else ())
    for name in required:
        if name not in components:
            raise ModelFailed(f"{path / 'model_index.json'} lists no {name}, which {pipeline} needs")
    return folder


def components_in(index: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the components of an index as (library, class), without those it leaves empty."""
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    return {name: (pair[0], pair[1]) for name, pair in pairs.items() if pair != [None, None]}


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises ModelFailed for a file that is missing or unreadable, or that holds another value than an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFailed(f"{file} is missing: is this a complete model in diffusers' format?") from None
    except (OSError, ValueError) as exc:
        raise ModelFailed(f"{file} cannot be read as JSON; fetch the model again") from exc
    if not isinstance(content, dict):
        raise ModelFailed(f"{file} does not contain a JSON object; fetch the model again")
    return content


def _component(path: Path, name: str, pair: tuple[Any, Any]) -> Component:
    library, class_name = pair
    if not (isinstance(library, str) and isinstance(class_name, str) and _is_trusted(library)):
        raise ModelUnusable(
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
    """Return the component's configuration; a tokenizer needs none, only its vocabulary.

    A processor of texts and images together may have a file of another name.
    """
    file = folder / kind.value
    if kind is Kind.PROCESSOR and not file.exists() and (folder / "processor_config.json").is_file():
        file = folder / "processor_config.json"
    return {} if kind is Kind.TOKENIZER and not file.exists() else read_json(file)


def _is_trusted(library: str) -> bool:
    """Return True for diffusers, transformers, and the packages of diffusers' own pipelines.

    The safety checker comes from such a package.
    """
    if library in {"diffusers", "transformers"}:
        return True
    spec = importlib.util.find_spec("diffusers")  # locates the package without importing it
    roots = spec.submodule_search_locations if spec and library.isidentifier() else None
    return any((Path(root) / "pipelines" / library / "__init__.py").is_file() for root in roots or ())


logger = logging.getLogger(__name__)

_MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
_SHARD: Final = re.compile(r"-\d{5}-of-\d{5}")
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def choose_variant(names: Iterable[str], stem: str, variant: str | None, where: str) -> str | None:
    """Return the weight files to load among a folder's file ``names``: a variant's name, or None for plain.

    ``stem`` is the prefix of the weight files' names; ``where`` names the folder in messages. If the variant
    is missing, the plain files are used; if the plain files are missing, the only variant. Either fallback is
    logged and changes the images by rounding only. Raises ConfigurationError if a variant has to be chosen,
    ModelFailed if there are no weights.
    """
    names = list(names)
    available = _variants(names, stem)
    if variant in available:
        return variant
    if variant is not None and None in available:
        logger.warning("%s has no variant %s; using its plain weights", where, variant)
        return None
    if variant is None and len(available) == 1:
        (only,) = available
        logger.info("%s has no plain weights; using its variant %s", where, only)
        return only
    variants = ", ".join(sorted(name for name in available if name))
    if variants:
        missing = f"no variant {variant} and no plain weights" if variant else "no plain weights"
        raise ConfigurationError(
            f"{where} has {missing}, only the variants {variants}; ask for one of them with --variant"
            " (VARIANT), or variant in the model configuration"
        )
    raise ModelFailed(_no_weights_message(names, where))


def weight_files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """Return the weight files of a variant: one file, or the shards that its index names.

    Raises ModelFailed if the index cannot be read or names a shard that is missing.
    """
    infix = f".{variant}" if variant else ""
    single = folder / f"{stem}{infix}.safetensors"
    index = folder / f"{stem}.safetensors.index{infix}.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelFailed(f"{folder} has neither {single.name} nor {index.name}; fetch the model again")
    shards = sorted(set(_weight_map(index).values()))
    for name in shards:
        if not (folder / name).is_file():
            raise ModelFailed(f"{index} names {name}, which is missing; fetch the model again")
    return [folder / name for name in shards]


def check_whole(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a safetensors file's tensors, by name.

    Raises ModelFailed if the file has no valid header, or is shorter or longer than its header declares.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ModelFailed(_broken(file, f"its {size} bytes hold no complete header"))
            header: dict[str, dict[str, list[int]]] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        ends = [tensor["data_offsets"][1] for tensor in header.values()]
        shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError) as exc:
        raise ModelFailed(_broken(file, "its header cannot be read")) from exc
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ModelFailed(_broken(file, f"it has {size} bytes, but its header declares {expected}"))
    if not shapes:
        raise ModelFailed(_broken(file, "it contains no weights"))
    return shapes


_NOT_DENOISER: Final = ("__metadata__", "text_encoders.", "vae.", "first_stage_model.")


def is_stored_in_bf16(model: ModelFolder, variants: Mapping[str, str | None]) -> bool:
    """Return True if the model's denoiser is a transformer with most of its weights in bf16.

    ``variants`` are those of the weight files to load, by component. Weights in fp8 or GGUF's types in a
    single file were made from bf16.
    """
    component = model.components.get("transformer")
    if component is None or (component.file is None and "transformer" not in variants):
        return False
    if component.file is not None and component.file.suffix.lower() == ".gguf":
        return True
    files = [component.file] if component.file is not None else None
    dtypes: Counter[str] = Counter()
    for file in files or weight_files(component.folder, component.stem, variants["transformer"]):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        dtypes.update(
            tensor["dtype"] for name, tensor in header.items() if not name.startswith(_NOT_DENOISER)
        )
    from_bf16 = ("BF16", "F8_E4M3", "F8_E5M2") if files else ("BF16",)
    return sum(dtypes[each] for each in from_bf16) > dtypes.total() / 2


RENAMED: Final = {"CLIPFeatureExtractor": "CLIPImageProcessor"}
"""Classes that transformers 5 has renamed; SD 1.4's index still has the old name."""


def class_of(component: Component) -> Any:
    """Return the component's class; raises ModelFailed if the installed library does not have it."""
    import diffusers
    import transformers

    class_name = RENAMED.get(component.class_name, component.class_name)
    if component.library == "transformers":
        namespace: Any = transformers
    elif component.library == "diffusers":
        namespace = diffusers
    else:
        namespace = getattr(diffusers.pipelines, component.library)
    try:
        return getattr(namespace, class_name)
    except (AttributeError, ImportError) as exc:
        raise ModelFailed(
            f"the model's {component.name} is a {class_name}, which the installed {component.library}"
            " does not have: install a newer version"
        ) from exc


def _variants(names: Iterable[str], stem: str) -> set[str | None]:
    """Return the variants of the files named ``stem[.variant][-shard].safetensors``; None is plain."""
    pattern = re.compile(rf"{re.escape(stem)}(?:\.([A-Za-z0-9_-]+?))?\.safetensors")
    matches = (pattern.fullmatch(_SHARD.sub("", name)) for name in names)
    return {match[1] for match in matches if match}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(key): str(name) for key, name in weights.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
        raise ModelFailed(f"{index} cannot be read; fetch the model again") from exc
    if not names or any("/" in name or "\\" in name for name in names.values()):
        raise ModelFailed(f"{index} does not name weight files in its own folder; fetch the model again")
    return names


def _no_weights_message(names: list[str], where: str) -> str:
    if any(name.endswith(_PICKLES) for name in names):
        return (
            f"{where} has pickled weights only (such as .bin), and loading those can run code; use a model"
            " with .safetensors files"
        )
    return f"{where} has no weights (.safetensors); fetch the model again"


def _broken(file: Path, reason: str) -> str:
    return f"{file} is truncated or not a safetensors file ({reason}); fetch the model again"


@dataclass(frozen=True, slots=True)
class Family:
    """The properties shared by all models of one pipeline class.

    ``denoiser`` is the component that predicts the noise; ``needs`` lists the other required components;
    ``names`` are the schedulers that a request can choose. ``flow`` is True for a model trained by flow
    matching, which needs a scheduler of that kind. ``packed`` is True if latents have the shape
    (n, h/2·w/2, 4c). ``patch`` is the number of latent pixels per side that one token covers.
    """

    name: str
    denoiser: str
    needs: tuple[str, ...]
    names: tuple[str, ...]
    flow: bool = False
    packed: bool = False
    patch: int = 1

    def runs_with(self, scheduler: str, config: dict[str, object]) -> bool:
        """Return True if the scheduler class is of the kind that the model was trained for.

        A multistep solver fits a flow-matching model if its configuration sets ``use_flow_sigmas``.
        """
        if self.flow:
            return scheduler in FLOW or (scheduler in DIFFUSION and bool(config.get("use_flow_sigmas")))
        return scheduler in DIFFUSION and not config.get("use_flow_sigmas")


_DIFFUSION_SCHEDULERS: Final = ("dpm++", "euler", "euler-a", "ddim", "unipc", "pndm", "heun", "lcm")
_SD_COMPONENTS: Final = ("vae", "scheduler", "text_encoder", "tokenizer")

FAMILIES: Final = {
    "StableDiffusionPipeline": Family("sd", "unet", _SD_COMPONENTS, _DIFFUSION_SCHEDULERS),
    "StableDiffusionXLPipeline": Family(
        "sdxl", "unet", (*_SD_COMPONENTS, "text_encoder_2", "tokenizer_2"), _DIFFUSION_SCHEDULERS
    ),
    "StableDiffusion3Pipeline": Family(
        "sd3",
        "transformer",
        (*_SD_COMPONENTS, "text_encoder_2", "tokenizer_2"),
        ("euler", "heun"),
        flow=True,
        patch=2,
    ),
    # Heun's scheduler takes no list of sigmas, and FluxPipeline always passes one.
    "FluxPipeline": Family(
        "flux",
        "transformer",
        (*_SD_COMPONENTS, "text_encoder_2", "tokenizer_2"),
        ("euler",),
        flow=True,
        packed=True,
        patch=2,
    ),
}
OTHER: Final = Family("other", "", ("scheduler",), ())
