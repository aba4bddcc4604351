"""Resolves a model's name to a folder on this machine: a local folder, or a snapshot from the hub.

Only the files that will be read are fetched: configurations, vocabularies, and one set of safetensors per
component. Needs no torch.
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
_TEXT_SUFFIXES: Final = (".json", ".txt", ".model")
TIMEOUT: Final = 10.0
"""Seconds for the hub to answer one request; a run makes up to three before it fails, 30 s in all."""


def find(options: EngineOptions, timeout: float = TIMEOUT) -> tuple[Path, str | None]:
    """Return the model's folder and, if it comes from the hub, its commit; ``timeout`` in seconds.

    Raises ConfigurationError for a name that can never be read, ModelFailed for a model that does not exist.
    """
    select_files = partial(wanted_files, options=options)
    return _resolve(
        _ModelSource(options.model, options.revision, "model", "model_index.json", select_files, timeout)
    )


def find_autoencoder(name: str) -> tuple[Path, str | None]:
    """Return an autoencoder's folder and, if it comes from the hub, its commit, as ``find`` does.

    A hub id may have a revision: ``owner/name@revision``.
    """
    hub_id, _, revision = (name, "", "") if Path(name).expanduser().is_dir() else name.partition("@")
    return _resolve(
        _ModelSource(
            hub_id, revision or None, "autoencoder", "config.json", _select_single_component, TIMEOUT
        )
    )


@dataclass(frozen=True, slots=True)
class _ModelSource:
    """A name to resolve, and how to select the files to fetch.

    ``kind`` is the word for it in messages; ``index`` is the file that every repository of the kind has.
    ``select_files`` selects the files that a load will read, from a repository's file names and the index's
    content. ``timeout``: seconds for the hub to answer one request.
    """

    name: str
    revision: str | None
    kind: str
    index: str
    select_files: Callable[[Sequence[str], Mapping[str, object]], list[str]]
    timeout: float


def _resolve(source: _ModelSource) -> tuple[Path, str | None]:
    name, kind = source.name, source.kind
    if "://" in name:
        raise ConfigurationError(
            f"{kind}s at {name.split('://')[0]}:// cannot be read; copy the {kind} into a folder"
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve(), None
    if folder.is_file():
        raise ModelFailed(f"{name} is a file; use a folder in diffusers' format")
    if name.startswith((".", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelFailed(f"no {kind} folder at {name}; use a folder, or a hub id such as owner/{kind}")
    return _fetch_from_hub(source)


def wanted_files(files: Sequence[str], index: Mapping[str, object], options: EngineOptions) -> list[str]:
    """Return a repository's files that a load will read. Raises ModelFailed where weights are missing."""
    selected = ["model_index.json"]
    for name, (library, class_name) in components_in(index).items():
        if name in CHECKER and not options.safety_checker:
            continue
        component_files = [file for file in files if str(PurePosixPath(file).parent) == name]
        selected += [file for file in component_files if file.endswith(_TEXT_SUFFIXES)]
        if kind_of(str(class_name)) is Kind.MODEL:
            names = [PurePosixPath(file).name for file in component_files]
            stem = stem_of(str(library))
            variant = choose_variant(names, stem, options.variant, f"{options.model}/{name}")
            selected += [f"{name}/{file}" for file in names if _is_weight_file(file, stem, variant)]
    return selected


def _is_weight_file(file: str, stem: str, variant: str | None) -> bool:
    dot = re.escape(f".{variant}") if variant else ""
    return bool(re.fullmatch(rf"{re.escape(stem)}{dot}(-\d+-of-\d+)?\.safetensors", file))


def _select_single_component(files: Sequence[str], _: Mapping[str, object]) -> list[str]:
    """Select the files of a repository that is one component: configuration and one set of weights."""
    component_files = [file for file in files if "/" not in file]
    stem = stem_of("diffusers")
    variant = choose_variant(component_files, stem, None, "the autoencoder")
    return ["config.json", *(file for file in component_files if _is_weight_file(file, stem, variant))]


def _fetch_from_hub(source: _ModelSource) -> tuple[Path, str | None]:
    """Return a snapshot with the needed files, or an earlier run's copy if the hub is unreachable."""
    # The hub's client reads these when it is imported; values that the user has set are kept.
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(int(TIMEOUT)))
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(int(TIMEOUT)))
    silence_hub()
    from huggingface_hub import errors, is_offline_mode

    if is_offline_mode():
        return _find_cached(source, "HF_HUB_OFFLINE is set")
    try:
        return _snapshot(source)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as exc:
        raise ModelFailed(_describe_refusal(source, exc)) from exc
    except ModelFailed:
        raise
    except Exception as exc:  # noqa: BLE001 - httpx's, urllib's and the hub's own errors share no other base
        return _find_cached(source, f"the hub cannot be reached ({type(exc).__name__})")


def _snapshot(source: _ModelSource) -> tuple[Path, str]:
    """Fetch one commit's files; files in the cache are not fetched again."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    info = HfApi().model_info(source.name, revision=source.revision, timeout=source.timeout)
    commit = str(info.sha)
    files = [str(sibling.rfilename) for sibling in info.siblings or ()]
    if source.index not in files:
        raise ModelFailed(f"{source.name} is not in diffusers' format: it has no {source.index}")
    # By name, not by commit: the cache then knows the name's commit, which an offline run needs.
    index = hf_hub_download(source.name, source.index, revision=source.revision, etag_timeout=source.timeout)
    selected = source.select_files(files, read_json(Path(index)))
    path = snapshot_download(
        source.name, revision=commit, allow_patterns=selected, etag_timeout=source.timeout
    )
    return Path(path), commit


def _find_cached(source: _ModelSource, reason: str) -> tuple[Path, str | None]:
    """Return the copy that an earlier run fetched; the inspection checks that it is complete."""
    from huggingface_hub import hf_hub_download

    try:
        index = hf_hub_download(source.name, source.index, revision=source.revision, local_files_only=True)
    except Exception as exc:
        raise ModelFailed(
            f"{reason} and this machine has no copy of {source.name}: check the network and the name, or use"
            " a model folder"
        ) from exc
    path = Path(index).parent
    return path, path.name


def _describe_refusal(source: _ModelSource, exc: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(exc, errors.GatedRepoError):
        return f"{source.name} is gated: accept its terms on the hub and set HF_TOKEN to your token"
    if isinstance(exc, errors.RevisionNotFoundError):
        return f"{source.name} has no revision {source.revision} on the hub"
    return f"{source.name} is not on the hub, or is private: check the name, or set HF_TOKEN to your token"
