"""From a name to a folder on this machine: a local folder, or a snapshot of the hub's.

Only the files that will be read are fetched: configurations, vocabularies, and one set of safetensors a
component. No torch.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from text2img.engine.devices import silence_hub
from text2img.engine.model_folder import (
    CHECKER,
    Kind,
    choose_variant,
    components_in,
    kind_of,
    read_json,
    stem_of,
)
from text2img.errors import ConfigurationError, ModelFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from text2img.engine import EngineOptions

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TEXTS: Final = (".json", ".txt", ".model")
PATIENCE: Final = 10.0
"""Seconds for the hub to answer one request; three of them and the run has waited its 30."""


def find(options: EngineOptions, patience: float = PATIENCE) -> tuple[Path, str | None]:
    """The model's folder and, where it is the hub's, the commit it is of; ``patience`` in seconds.

    Raises ConfigurationError for a name that can never be read, ModelFailed for a model that is not there.
    """
    files = partial(wanted_files, options=options)
    return _find(
        _FileSelection(options.model, options.revision, "model", "model_index.json", files, patience)
    )


def find_autoencoder(name: str) -> tuple[Path, str | None]:
    """The same for an autoencoder's folder or hub id, the latter with a revision behind an @ if need be."""
    hub_id, _, revision = (name, "", "") if Path(name).expanduser().is_dir() else name.partition("@")
    return _find(
        _FileSelection(hub_id, revision or None, "autoencoder", "config.json", _single_files, PATIENCE)
    )


@dataclass(frozen=True, slots=True)
class _FileSelection:
    """What is looked for. ``kind``: a word for it; ``index``: the file that each of its kind has; ``files``:
    which of a repository's files a load will read, given their names and what the index holds; ``patience``:
    seconds for the hub to answer one request.
    """

    name: str
    revision: str | None
    kind: str
    index: str
    files: Callable[[Sequence[str], Mapping[str, object]], list[str]]
    patience: float


def _find(sought: _FileSelection) -> tuple[Path, str | None]:
    name, kind = sought.name, sought.kind
    if "://" in name:
        raise ConfigurationError(
            f"{kind}s at {name.split('://')[0]}:// cannot be read; copy the {kind} into a folder"
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve(), None
    if folder.is_file():
        raise ModelFailed(f"{name} is a file; name a folder in diffusers' format")
    if name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelFailed(f"no {kind} folder at {name}; name a folder, or a hub id such as owner/{kind}")
    return _from_hub(sought)


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


def _single_files(files: Sequence[str], _: Mapping[str, object]) -> list[str]:
    """What a load reads of a repository that is one component: its configuration and one set of weights."""
    inside = [file for file in files if "/" not in file]
    stem = stem_of("diffusers")
    variant = choose_variant(inside, stem, None, "the autoencoder")
    return ["config.json", *(file for file in inside if _is_of(file, stem, variant))]


def _from_hub(sought: _FileSelection) -> tuple[Path, str | None]:
    """A snapshot with what is needed; the copy from an earlier run where the hub cannot be reached."""
    # The hub's client reads these when it is imported; what the user has set stands.
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(int(PATIENCE)))
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(int(PATIENCE)))
    silence_hub()
    from huggingface_hub import errors, is_offline_mode

    if is_offline_mode():
        return _cached(sought, "HF_HUB_OFFLINE is set")
    try:
        return _snapshot(sought)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as exc:
        raise ModelFailed(_refused(sought, exc)) from exc
    except ModelFailed:
        raise
    except Exception as exc:  # noqa: BLE001 - httpx's, urllib's and the hub's own errors share no other base
        return _cached(sought, f"the hub cannot be reached ({type(exc).__name__})")


def _snapshot(sought: _FileSelection) -> tuple[Path, str]:
    """Fetch one commit's files; what the cache has already is not fetched again."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    info = HfApi().model_info(sought.name, revision=sought.revision, timeout=sought.patience)
    commit = str(info.sha)
    files = [str(sibling.rfilename) for sibling in info.siblings or ()]
    if sought.index not in files:
        raise ModelFailed(f"{sought.name} is no {sought.kind} in diffusers' format: it has no {sought.index}")
    # By its name, not its commit: so the cache learns which commit the name stands for, for a run offline.
    index = hf_hub_download(sought.name, sought.index, revision=sought.revision, etag_timeout=sought.patience)
    wanted = sought.files(files, read_json(Path(index)))
    path = snapshot_download(
        sought.name, revision=commit, allow_patterns=wanted, etag_timeout=sought.patience
    )
    return Path(path), commit


def _cached(sought: _FileSelection, why: str) -> tuple[Path, str | None]:
    """The copy that an earlier run fetched; whether it is whole is found out when it is inspected."""
    from huggingface_hub import hf_hub_download

    try:
        index = hf_hub_download(sought.name, sought.index, revision=sought.revision, local_files_only=True)
    except Exception as exc:
        raise ModelFailed(
            f"{why} and this machine has no copy of {sought.name}: check the network and the name, or name"
            " a model folder"
        ) from exc
    path = Path(index).parent
    return path, path.name


def _refused(sought: _FileSelection, exc: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(exc, errors.GatedRepoError):
        return f"{sought.name} is gated: accept its terms on the hub and set HF_TOKEN to your token"
    if isinstance(exc, errors.RevisionNotFoundError):
        return f"{sought.name} has no revision {sought.revision} on the hub"
    return f"{sought.name} is not on the hub, or is private: check the name, or set HF_TOKEN to your token"
