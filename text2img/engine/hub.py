"""From a model's name to a folder on this machine: a local folder, or a snapshot of the hub's.

Only the files that will be read are fetched: configurations, vocabularies, and one set of safetensors a
component. No torch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from text2img.engine.folder import CHECKER, Kind, components_in, kind_of, read_json, stem_of
from text2img.engine.quiet import hush_hub
from text2img.engine.weights import choose_variant
from text2img.errors import ConfigurationError, ModelFailed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from text2img.engine.options import EngineOptions

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TEXTS: Final = (".json", ".txt", ".model")
_PATIENCE: Final = 10.0
"""Seconds for the hub to answer one request; three of them and the run has waited its 30."""


def find(options: EngineOptions) -> tuple[Path, str | None]:
    """The model's folder and, where it is the hub's, the commit it is of.

    Raises ConfigurationError for a name that can never be read, ModelFailed for a model that is not there.
    """
    name = options.model
    if "://" in name:
        raise ConfigurationError(
            f"models at {name.split('://')[0]}:// cannot be read yet; copy the model into a folder"
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve(), None
    if folder.is_file():
        raise ModelFailed(f"{name} is a file; a model is a folder in diffusers' format")
    if name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelFailed(f"no model folder at {name}; name a folder, or a hub id such as owner/model")
    return _from_hub(options)


def wanted_files(files: Sequence[str], index: Mapping[str, object], options: EngineOptions) -> list[str]:
    """Which of a repository's files a load will read. Raises ModelFailed where weights are missing."""
    wanted = ["model_index.json"]
    for name, (library, class_name) in components_in(index).items():
        if name in CHECKER and not options.safety_checker:
            continue
        inside = [file for file in files if str(PurePosixPath(file).parent) == name]
        wanted += [file for file in inside if file.endswith(_TEXTS)]
        if kind_of(str(class_name)) is Kind.MODEL:
            names = [PurePosixPath(file).name for file in inside]
            stem = stem_of(str(library))
            variant = choose_variant(names, stem, options.variant, f"{options.model}/{name}")
            wanted += [f"{name}/{file}" for file in names if _is_of(file, stem, variant)]
    return wanted


def _is_of(file: str, stem: str, variant: str | None) -> bool:
    dot = re.escape(f".{variant}") if variant else ""
    return bool(re.fullmatch(rf"{re.escape(stem)}{dot}(-\d+-of-\d+)?\.safetensors", file))


def _from_hub(options: EngineOptions) -> tuple[Path, str | None]:
    """A snapshot with what is needed; the copy from an earlier run where the hub cannot be reached."""
    # The hub's client reads these when it is imported; what the user has set stands.
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(int(_PATIENCE)))
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(int(_PATIENCE)))
    hush_hub()
    from huggingface_hub import errors, is_offline_mode

    if is_offline_mode():
        return _cached(options, "HF_HUB_OFFLINE is set")
    try:
        return _snapshot(options)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as exc:
        raise ModelFailed(_refused(options, exc)) from exc
    except ModelFailed:
        raise
    except Exception as exc:  # noqa: BLE001 - httpx's, urllib's and the hub's own errors share no other base
        return _cached(options, f"the hub cannot be reached ({type(exc).__name__})")


def _snapshot(options: EngineOptions) -> tuple[Path, str]:
    """Fetch one commit's files; what the cache has already is not fetched again."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    info = HfApi().model_info(options.model, revision=options.revision, timeout=_PATIENCE)
    commit = str(info.sha)
    files = [str(sibling.rfilename) for sibling in info.siblings or ()]
    if "model_index.json" not in files:
        raise ModelFailed(f"{options.model} is no model in diffusers' format: it has no model_index.json")
    # By its name, not its commit: so the cache learns which commit the name stands for, for a run offline.
    index = hf_hub_download(
        options.model, "model_index.json", revision=options.revision, etag_timeout=_PATIENCE
    )
    wanted = wanted_files(files, read_json(Path(index)), options)
    path = snapshot_download(options.model, revision=commit, allow_patterns=wanted, etag_timeout=_PATIENCE)
    return Path(path), commit


def _cached(options: EngineOptions, why: str) -> tuple[Path, str | None]:
    """The copy that an earlier run fetched; whether it is whole is found out when it is inspected."""
    from huggingface_hub import hf_hub_download

    try:
        index = hf_hub_download(
            options.model, "model_index.json", revision=options.revision, local_files_only=True
        )
    except Exception as exc:
        raise ModelFailed(
            f"{why} and this machine has no copy of {options.model}: check the network and the name, or name"
            " a model folder"
        ) from exc
    path = Path(index).parent
    return path, path.name


def _refused(options: EngineOptions, exc: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(exc, errors.GatedRepoError):
        return f"{options.model} is gated: accept its terms on the hub and set HF_TOKEN to your token"
    if isinstance(exc, errors.RevisionNotFoundError):
        return f"{options.model} has no revision {options.revision} on the hub"
    return f"{options.model} is not on the hub, or is private: check the name, or set HF_TOKEN to your token"
