"""``verify``: the marks of images, whether they hold, and whether the images are the recorded ones."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from text2img.databases import Selection
from text2img.errors import ConfigurationError, ObjectUnreadable
from text2img.images.provenance import Marks, State, inspect
from text2img.reports.gallery.page import quiet
from text2img.settings import expand_home
from text2img.storage import MAX_OBJECT_BYTES, ImageStorage
from text2img.telemetry.terminal import print_lines, print_result
from text2img.worker import build

if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from text2img.databases import CompletedPrompt, Database
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress

_FAILED: Final = {str(State.BROKEN), str(State.UNMARKED), "unreadable"}
_CONCURRENCY: Final = 8
"""Images read in parallel: most of the time is spent waiting for the storage."""
_GROUP: Final = 64
"""Images held in memory at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Image:
    """An image to verify: its URL or path, and what the database records of it, None if that is unknown."""

    url: str
    prompt_id: str | None = None
    hashes: Collection[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """A verified image; ``recorded``: its hash is one that the database records for it."""

    image: _Image
    marks: Marks | None
    reason: str
    sha256: str | None = None
    recorded: bool | None = None

    @property
    def state(self) -> str:
        """The state of its marks, or ``unreadable``."""
        return "unreadable" if self.marks is None else str(self.marks.state)

    @property
    def document(self) -> dict[str, object]:
        """The object in the JSON output."""
        marks = self.marks
        return {
            "file": self.image.url,
            "state": self.state,
            "reason": self.reason,
            "prompt_id": self.image.prompt_id,
            "sha256": self.sha256,
            "recorded": self.recorded,
            "xmp": marks and marks.xmp,
            "manifest": marks and marks.manifest,
            "parameters": marks and marks.parameters,
        }


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Print the marks of each image; return 3 if one of them is broken, unmarked or unreadable."""
    del progress
    run_id = arguments.run_id or (None if arguments.files else settings.run_id)
    if bool(arguments.files) == bool(run_id):
        raise ConfigurationError("verify takes image files, or --run-id RUN; give one of the two")
    anchors = _trust_anchors(settings.c2pa_trust_anchors)
    counts: Counter[str] = Counter()
    documents: list[dict[str, object]] = []
    with quiet():
        for verdict in _verdicts(settings, arguments.files, run_id, anchors):
            counts[verdict.state] += 1
            documents.append(verdict.document)
            print_lines(*_lines(verdict))
    status = 3 if counts.keys() & _FAILED else 0
    found = ", ".join(f"{count:,} {state}" for state, count in sorted(counts.items()) if count)
    print_lines(f"{sum(counts.values()):,} images: {found or 'none'}")
    print_result({"status": status, "images": documents, "counts": {**counts}})
    return status


def _verdicts(
    settings: Settings, files: Sequence[str], run_id: str | None, anchors: str | None
) -> Iterator[_Verdict]:
    if run_id:
        read = build.storage(settings).read
        with closing(build.database(settings, create=False)) as database:
            if database.runs.run(run_id) is None:
                raise ConfigurationError(f"there is no run {run_id!r}; status lists the last ones")
            made = database.results.completed(Selection(), run_id)
            images = (image for prompt in made for image in _images_of(prompt))
            yield from _verified(images, partial(_verdict, read, anchors))
        return
    storage = build.storage(settings) if any("://" in name for name in files) else None
    given = [_Image(url=name) for name in files]
    verdicts = _verified(given, partial(_verdict, partial(_read, storage), anchors))
    if not (settings.mongo_uri or settings.database or settings.output_dir):
        yield from verdicts
        return
    with closing(build.database(settings, create=False)) as database:
        yield from _compared(list(verdicts), database)


def _images_of(prompt: CompletedPrompt) -> Iterator[_Image]:
    """Return the images of a prompt; those of a loop's other candidates have their own hashes."""
    name = str(prompt.id)
    for url in prompt.image_urls:
        yield _Image(url=url, prompt_id=name, hashes=prompt.hashes)
    for entry in prompt.tries:
        other = entry.get("image_url")
        if isinstance(other, str) and other not in prompt.image_urls:
            yield _Image(url=other, prompt_id=name, hashes={str(entry.get("sha256"))})


def _verified(images: Iterable[_Image], verdict: Any) -> Iterator[_Verdict]:
    """Yield the verdicts in the images' order; a few images are read at once."""
    remaining = iter(images)
    with ThreadPoolExecutor(_CONCURRENCY, "verify") as pool:
        while group := list(islice(remaining, _GROUP)):
            yield from pool.map(verdict, group)


def _verdict(read: Any, anchors: str | None, image: _Image) -> _Verdict:
    try:
        data = read(image.url)
    except ObjectUnreadable as exc:
        return _Verdict(image=image, marks=None, reason=str(exc))
    marks, sha256 = inspect(data, anchors), hashlib.sha256(data).hexdigest()
    verdict = _Verdict(image=image, marks=marks, reason=marks.reason, sha256=sha256)
    return verdict if image.hashes is None else _judged(verdict, image.hashes)


def _judged(verdict: _Verdict, hashes: Collection[str]) -> _Verdict:
    """Return the verdict with what the database records: an image of another hash is broken."""
    if verdict.marks is None or verdict.sha256 in hashes:
        return replace(verdict, recorded=verdict.marks is not None)
    broken = replace(verdict.marks, state=State.BROKEN)
    reason = f"{verdict.reason}; it is not the image that the database records"
    return replace(verdict, marks=broken, reason=reason, recorded=False)


def _compared(verdicts: Sequence[_Verdict], database: Database) -> Iterator[_Verdict]:
    """Yield the verdicts, compared with the image of the file's path or URL, else with one of its hash."""
    places = {_place(verdict.image.url) for verdict in verdicts}
    hashes = {verdict.sha256 for verdict in verdicts}
    by_place: dict[str, _Image] = {}
    by_hash: dict[str, _Image] = {}
    for prompt in database.results.completed(Selection()):
        for image in _images_of(prompt):
            if image.url in places:
                by_place[image.url] = image
            by_hash.update((sha256, image) for sha256 in image.hashes or () if sha256 in hashes)
    for verdict in verdicts:
        recorded = by_place.get(_place(verdict.image.url)) or by_hash.get(verdict.sha256 or "")
        if recorded is None:
            yield verdict
        else:
            named = replace(verdict, image=replace(verdict.image, prompt_id=recorded.prompt_id))
            yield _judged(named, recorded.hashes or ())


def _place(name: str) -> str:
    return name if "://" in name else os.path.abspath(name)  # noqa: PTH100 - as LocalStorage names it


def _read(storage: ImageStorage | None, name: str) -> bytes:
    """Return a file's content; URLs are read from the configured storage only."""
    if storage is not None and "://" in name:
        return storage.read(name)
    try:
        with expand_home(name, "FILE").open("rb") as file:
            data = file.read(MAX_OBJECT_BYTES + 1)
    except (OSError, ValueError) as exc:
        reason = (exc.strerror if isinstance(exc, OSError) else None) or "its name is invalid"
        raise ObjectUnreadable(f"it cannot be read: {reason}") from exc
    if len(data) > MAX_OBJECT_BYTES:
        raise ObjectUnreadable(f"it is larger than {MAX_OBJECT_BYTES >> 20} MiB")
    return data


def _trust_anchors(name: str | None) -> str | None:
    if not name:
        return None
    option = "--c2pa-trust-anchors (C2PA_TRUST_ANCHORS)"
    try:
        pem = Path(expand_home(name, option)).read_text("utf-8")
    except (OSError, ValueError) as exc:
        reason = (exc.strerror if isinstance(exc, OSError) else None) or "it is not PEM"
        raise ConfigurationError(f"{option}: the file cannot be read: {reason}") from exc
    if "-----BEGIN CERTIFICATE-----" not in pem:
        raise ConfigurationError(f"{option} contains no certificates in PEM")
    return pem


def _lines(verdict: _Verdict) -> list[str]:
    """Return the lines for people: the verdict, and the image's marks."""
    recorded = {True: "; its hash is the recorded one", False: "", None: ""}[verdict.recorded]
    lines = [f"{verdict.image.url}: {verdict.state}: {verdict.reason}{recorded}"]
    if verdict.marks is not None:
        statements = {
            "XMP": _chosen(verdict.marks.xmp, _XMP),
            "manifest": _chosen(verdict.marks.manifest, _MANIFEST),
            "parameters": _chosen(verdict.marks.parameters, _PARAMETERS),
        }
        lines += [f"  {name}: {words}" for name, words in statements.items() if words]
    return lines


_XMP: Final = (
    *("DigitalSourceType", "CreatorTool", "AISystemUsed", "AISystemVersionUsed", "creator", "rights"),
    "AIPromptInformation",
)
_MANIFEST: Final = ("generator", "actions", "source_type", "model", "revision", "time", "ingredients")
_PARAMETERS: Final = (
    "model",
    "seed",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "scheduler",
    "software",
    "prompt",
)
_MAX_CHARS: Final = 120


def _chosen(values: Mapping[str, object] | None, names: Sequence[str]) -> str:
    shown = {name: values.get(name) for name in names} if values else {}
    texts = {
        name: ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value).rpartition("/digitalsourcetype/")[2]
        for name, value in shown.items()
        if value not in (None, "", [])
    }
    return "; ".join(
        f"{name} {text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + '…'}"
        for name, text in texts.items()
    )
