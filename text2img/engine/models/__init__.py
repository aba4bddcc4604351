"""Models in buckets: looked at, fetched whole or not at all, and kept; up to a folder on this machine.

Which of the objects a load will read, ``engine.hub`` says, as for the hub's. Knows no torch and no vendor.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from text2img.engine import hub
from text2img.engine.models.download import Download
from text2img.engine.models.snapshots import Copies
from text2img.errors import ConfigurationError, ModelFailed, StorageFailed
from text2img.storage import StorageOptions, locate, open_bucket
from text2img.storage.bucket import Faltered, Refused, Waiting, persist

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from text2img.engine.options import EngineOptions
    from text2img.storage.bucket import Listed, Readable

log = logging.getLogger(__name__)

PATIENCE: Final = 20.0
"""Seconds that a bucket which does not answer is asked again."""
_INDEX: Final = "model_index.json"
_LARGEST_INDEX: Final = 1_000_000  # bytes; real ones have a thousand
_MOST: Final = 10_000  # objects in a model's folder; a pipeline of many variants has a hundred
_CHANGED: Final = (404, 412)  # what HTTP answers where an object is not, or not any more, what was listed
_TRY: Final = 5.0  # seconds for one request's own tries


class Shelf:
    """The folder that keeps models from buckets; finds any model, those too that are in none.

    ``wait(seconds)`` sleeps, and raises when the run is to end; ``clock()`` counts the seconds of the
    patience.
    """

    def __init__(
        self,
        folder: Path,
        wait: Callable[[float], None] = time.sleep,
        *,
        s3_endpoint: str | None = None,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._wait, self._patience, self._clock = folder, wait, patience, clock
        self._endpoint, self._try = s3_endpoint, min(_TRY, patience)
        self._held: list[Copies] = []  # what is in use must not be removed

    def find(self, options: EngineOptions) -> tuple[Path, str | None]:
        """The model's folder on this machine and its revision: the hub's commit, a hash of a bucket's files.

        A copy that is what the bucket has is used as it is; of a bucket that cannot be reached, the latest.
        Raises ConfigurationError where the bucket or the folder in it is not there, ModelFailed where what is
        there is no model or cannot be fetched whole, and what ``wait`` does.
        """
        place = locate(options.model, "--model-id (or model_path)")
        if place is None:
            return hub.find(options)
        if options.revision:
            raise ConfigurationError(
                f"{options.model} has no revisions; leave out --model-revision, or the configuration's"
            )
        kind, name, prefix = place
        copies = Copies(self._folder / _digest(options), self._wait)
        self._held.append(copies)
        try:
            endpoint, clock = StorageOptions(s3_endpoint=self._endpoint), Waiting(self._wait, self._clock)
            bucket = open_bucket(kind, name, endpoint, self._try, clock=clock)
            ask = partial(persist, patience=self._patience, timeout=0, sleep=self._wait, clock=self._clock)
            sought = ask(lambda _: _Sought.of(bucket, prefix, options))
        except Refused as exc:
            raise ConfigurationError(_refused(options.model, exc)) from exc
        except Faltered as exc:
            return _latest(copies, options.model, exc)
        return self._fetched(bucket, sought, copies, options.model), sought.revision

    def _fetched(self, bucket: Readable, sought: _Sought, copies: Copies, url: str) -> Path:
        """The copy of these files, made where there is none."""
        sizes = {name: listed.size for name, listed in sought.files.items()}
        download = Download(bucket, sought.files, self._wait, self._patience, self._clock)
        try:
            return copies.find(sought.revision, sizes) or copies.add(sought.revision, sizes, download.into)
        except OSError as exc:
            raise ModelFailed(
                f"{url} cannot be kept in {self._folder} ({exc.strerror}); name another by --model-cache"
            ) from exc
        except Refused as exc:
            raise ModelFailed(f"{url} could not be fetched: {_meaning(exc)}") from exc
        except StorageFailed as exc:
            raise ModelFailed(f"{url} could not be fetched: {exc}") from exc


@dataclass(frozen=True, slots=True)
class _Sought:
    """The objects that a load will read, by their names in the model's folder."""

    files: Mapping[str, Listed]

    @classmethod
    def of(cls, bucket: Readable, prefix: str, options: EngineOptions) -> _Sought:
        """Those of a bucket's folder. Raises what the bucket does, and ModelFailed for what is no model."""
        url = options.model
        found = bucket.objects(prefix, _MOST + 1)
        if not found:
            raise ConfigurationError(f"there is nothing at {url}; check the bucket's name and the folder's")
        if len(found) > _MOST:
            raise ModelFailed(f"{url} holds more than {_MOST:,} objects; name the model's own folder")
        there = _by_name(found, prefix, url)
        if _INDEX not in there:
            raise ModelFailed(f"{url} is no model in diffusers' format: it has no {_INDEX}")
        index = _index(bucket, there[_INDEX], url)
        return cls({name: there[name] for name in hub.wanted_files(list(there), index, options)})

    @property
    def revision(self) -> str:
        """A hash of names, sizes and the service's sums: the same for the same files, wherever they are."""
        files = sorted((name, each.size, each.checksum) for name, each in self.files.items())
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:40]


def _by_name(found: Iterable[Listed], prefix: str, url: str) -> dict[str, Listed]:
    """The objects by their names below the prefix, all of which could be files of a folder.

    Consoles mark folders by empty objects that end in a slash: those are passed over.
    """
    named = {each.path[len(prefix) :]: each for each in found}
    files = {name: each for name, each in named.items() if name and not (name[-1] == "/" and not each.size)}
    for name in files:
        odd = any(char == "\\" or not char.isprintable() for char in name)
        if odd or any(part.strip() in {"", ".", ".."} for part in name.split("/")):
            raise ModelFailed(
                f"{url} holds {name[:200]!r}, which is no name that a file in a model's folder could have;"
                " look who writes there, and remove it"
            )
    return files


def _index(bucket: Readable, listed: Listed, url: str) -> dict[str, object]:
    index = None
    try:
        if 0 < listed.size <= _LARGEST_INDEX:
            index = json.loads(bucket.read(listed.path, listed.version, 0, listed.size))
    except ValueError:
        pass
    except Refused as exc:
        if exc.status not in _CHANGED:
            raise
        raise ModelFailed(f"{url} could not be fetched: {_meaning(exc)}") from exc
    if not isinstance(index, dict):
        raise ModelFailed(f"{url}/{_INDEX} cannot be read as JSON; upload the model again")
    return index


def _latest(copies: Copies, url: str, exc: Faltered) -> tuple[Path, str]:
    latest = copies.latest()
    if latest is None:
        raise ModelFailed(f"{url} cannot be looked at, and this machine has no copy: {exc}") from exc
    log.warning("%s cannot be looked at (%s); the latest copy of it is used", url, exc)
    return latest, latest.name


def _meaning(exc: Refused) -> str:
    """Of a refusal to read what the bucket has just listed."""
    return "it changed meanwhile; run it again" if exc.status in _CHANGED else f"the bucket answers {exc}"


def _refused(url: str, exc: Refused) -> str:
    if exc.status == 404:
        return f"there is no bucket for {url}; check its name"
    if exc.status in {401, 403}:
        return f"this account may not list and read {url} ({exc}); grant it, and check the bucket's name"
    return f"{url} cannot be read: its bucket answers {exc}"


def _digest(options: EngineOptions) -> str:
    """What tells apart models, and the sets of files that are read of one."""
    asked = (options.model.rstrip("/"), options.variant, options.safety_checker)
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:40]
