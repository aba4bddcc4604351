"""Files that a run with ``--layout folders`` writes next to its images.

``RunSummary`` writes the run's summary, contact sheets and score histogram; ``Sidecars`` writes the files of
each prompt.
"""

from __future__ import annotations

import json
import logging
import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from text2img.databases.run_documents import run_fields
from text2img.errors import ClaimLost, ConfigurationError, ObjectUnreadable, PromptFailed
from text2img.images import is_overview
from text2img.images.contact_sheet import Candidate, Row, contact_sheets, histogram
from text2img.prompts import Completed, Failed, NeedsRefinement
from text2img.prompts.quoting import json_text
from text2img.storage import MAX_OBJECT_BYTES, Existing, ImageReader, StorageOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from text2img.databases import CompletedPrompt, Results, Run, Selection
    from text2img.prompts import Claim, Outcome, StoredImage
    from text2img.prompts.ids import IterationFolderName
    from text2img.prompts.refinement import Loop
    from text2img.storage import ImageStorage


log = logging.getLogger(__name__)

MAX_IMAGES: Final = 600
"""Approximate maximum of images on contact sheets: the run reads each of them at its end."""
_LABEL_LIMIT: Final = 2**63
_PRIVATE: Final = ("host", "worker", "execution", "gpu_hour_price")
"""Fields of a run's document about its owner; the summary may be as public as the images."""


class RunSummary:
    """Writer of a run's summary files; each call of ``write`` replaces them.

    ``check`` is called before each image is read, and raises an exception to end the run.
    """

    def __init__(self, results: Results, storage: ImageStorage, check: Callable[[], None]) -> None:
        self._results, self._storage, self._check = results, storage, check

    def write(self, run: Run, selection: Selection, loop: Loop | None) -> None:
        """Write all summary files. Raises StorageFailed and DatabaseFailed."""
        self._put("summary.json", as_json(_summary(run, loop)), JSON)
        self._write_contact_sheets(selection)
        self._write_histogram(selection, loop)

    def _write_contact_sheets(self, selection: Selection) -> None:
        prompts: list[CompletedPrompt] = []
        images = 0
        for prompt in self._results.completed(selection):
            if images >= MAX_IMAGES:
                log.info("the contact sheets show only %d prompts; a report shows all", len(prompts))
                break
            prompts.append(prompt)
            images += len(prompt.tries or prompt.image_urls)
        rows = (self._row(prompt) for prompt in sorted(prompts, key=lambda prompt: prompt.id.name))
        grid = all(len(prompt.tries or prompt.image_urls) <= 1 for prompt in prompts)
        for number, page in enumerate(contact_sheets(rows, grid=grid), 1):
            self._put(f"contact-sheet{f'-{number}' if number > 1 else ''}.png", page, "image/png")

    def _write_histogram(self, selection: Selection, loop: Loop | None) -> None:
        """Write a histogram of each prompt's best score, unless no prompt has a score."""
        scores = [
            prompt.scores[0] if prompt.scores else None for prompt in self._results.completed(selection)
        ]
        if any(score is not None for score in scores):
            page = histogram(scores, min_score=None if loop is None else loop.min_score)
            self._put("scores.png", page, "image/png")

    def _row(self, prompt: CompletedPrompt) -> Row:
        if prompt.tries:
            return Row(prompt.text, tuple(self._candidate(entry) for entry in prompt.tries))
        seed, scores = prompt.used.get("seed"), prompt.scores or (None,) * len(prompt.image_urls)
        return Row(
            prompt.text,
            tuple(
                Candidate(
                    1, seed + number if isinstance(seed, int) else 0, score, False, partial(self._read, url)
                )
                for number, (url, score) in enumerate(zip(prompt.image_urls, scores, strict=False))
            ),
        )

    def _candidate(self, entry: Mapping[str, object]) -> Candidate:
        iteration, seed, score = (entry.get(name) for name in ("iteration", "seed", "score"))
        return Candidate(
            iteration if _is_number(iteration) and isinstance(iteration, int) else 1,
            seed if _is_number(seed) and isinstance(seed, int) else 0,
            float(score) if _is_number(score) and isinstance(score, int | float) else None,
            entry.get("best") is True,
            partial(self._read, str(entry.get("image_url"))),
        )

    def _read(self, url: str) -> bytes:
        self._check()
        return self._storage.read(url)

    def _put(self, name: str, data: bytes, content_type: str) -> None:
        self._storage.put(name, data, content_type, lambda: True, partial(_classify_summary, name))


SUMMARY_FILES: Final = ("summary.json", "contact-sheet.png", "scores.png")
"""The summary files of a run; further contact sheets have a number before the ending."""


def is_own_summary(name: str, file: bytes) -> bool:
    """Return whether a summary file was written by a run, and not by another program."""
    if not name.endswith(".json"):
        return is_overview(file)
    fields = _json_object(file)
    versions = fields.get("versions")
    return {"run_id", "started_at", "seconds"} <= fields.keys() and isinstance(versions, dict)


def check_summary_folder(folder: Path) -> None:
    """Raise ConfigurationError if the folder has another program's file under a summary's name."""
    for path in sorted({*folder.glob("contact-sheet*.png"), *(folder / name for name in SUMMARY_FILES)}):
        if os.path.lexists(path) and not is_own_summary(path.name, _content(path)):
            raise _foreign_summary(str(path))


def check_summary_bucket(place: tuple[str, str, str], storage: ImageStorage) -> None:
    """Raise ConfigurationError as ``check_summary_folder`` does; ``place`` is scheme, bucket and prefix."""
    scheme, bucket, prefix = place
    for name in SUMMARY_FILES:
        url = f"{scheme}://{bucket}/{prefix}{name}"
        with suppress(ObjectUnreadable):
            if not is_own_summary(name, ImageReader(storage, StorageOptions()).read(url)):
                raise _foreign_summary(url)


def _content(path: Path) -> bytes:
    """Return the content of a regular file; empty for anything else, and for one that cannot be read."""
    try:
        small = path.is_file() and not path.is_symlink() and path.stat().st_size <= MAX_OBJECT_BYTES
        return path.read_bytes() if small else b""
    except OSError:
        return b""


def _foreign_summary(where: str) -> ConfigurationError:
    return ConfigurationError(
        f"{where} was not written by text2img, and a run would replace it; move it, or choose another"
        " --output-dir or --output"
    )


def _classify_summary(name: str, existing: bytes) -> Existing:
    return Existing.OURS if is_own_summary(name, existing) else Existing.FOREIGN


def _json_object(file: bytes) -> dict[str, object]:
    """Return the fields of a JSON object; empty for any other file."""
    try:
        document = json.loads(file)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _is_number(value: object) -> bool:
    """Return True for a number that fits a label; another program may have written any."""
    return isinstance(value, int | float) and -_LABEL_LIMIT < value < _LABEL_LIMIT


def _summary(run: Run, loop: Loop | None) -> Mapping[str, object]:
    """Return the run's document without private fields, and its loop."""
    fields = {
        name: value.isoformat() if hasattr(value, "isoformat") else value
        for name, value in run_fields(run, 0).items()
        if name not in _PRIVATE
    }
    loop_fields = (
        {name: getattr(loop, name) for name in ("iterations", "candidates", "min_score")} if loop else {}
    )
    return {"run_id": run.id, **fields, **({"loop": loop_fields} if loop_fields else {})}


if TYPE_CHECKING:
    Document = Mapping[str, object]


JSON = "application/json"
YAML = "application/yaml"


class Sidecars:
    """Writer of the files that describe each prompt's outcome. Safe to use from several threads.

    ``holds`` returns True while this worker still holds a claim.
    """

    def __init__(
        self, storage: ImageStorage, names: IterationFolderName, holds: Callable[[Claim], bool]
    ) -> None:
        self._storage, self._names, self._holds = storage, names, holds

    def write(self, outcome: Outcome) -> None:
        """Store the files of an outcome that is about to be recorded; none if the prompt will be retried.

        Raises StorageFailed. A file that the storage rejects is skipped with a warning.
        """
        try:
            for name, data, content_type in _files(outcome):
                self._put(outcome, name, data, content_type)
        except ClaimLost:  # recording will find that out as well, and drop the outcome
            return

    def _put(self, outcome: Outcome, name: str, data: bytes, content_type: str) -> None:
        path, holds = f"{self._names.folder(outcome.claim.id)}/{name}", partial(self._holds, outcome.claim)
        try:
            self._storage.put(path, data, content_type, holds, partial(_classify_sidecar, outcome))
        except PromptFailed as exc:
            log.warning("a sidecar file of %s is skipped: %s", outcome.claim.id, exc)


def _classify_sidecar(outcome: Outcome, existing: bytes) -> Existing:
    """Return OURS for a file about an image that is recorded for the prompt, or about a failure of it.

    A file about images holds their hashes. Another database's has none of ours.
    """
    images = _kept_images(outcome) if isinstance(outcome, Completed | NeedsRefinement) else ()
    hashes = {*outcome.prompt.recorded_hashes, *(image.sha256 for image in images)}
    if any(each.encode() in existing for each in hashes):
        return Existing.OURS
    summary = _json_object(existing)
    failed = summary.get("status") == "error" and summary.get("prompt_id") == str(outcome.claim.id)
    return Existing.OURS if failed else Existing.FOREIGN


def as_json(document: object) -> bytes:
    """Return indented JSON in ASCII. What JSON has no form for is null or text."""
    return (json_text(document, indent=2) + "\n").encode()


def _files(outcome: Outcome) -> list[tuple[str, bytes, str]]:
    """Return the files of an outcome. Never raises: a file that cannot be made is left out."""
    files: list[tuple[str, bytes, str]] = []
    try:
        if isinstance(outcome, Completed | NeedsRefinement):
            files += _iteration_files(outcome)
        if isinstance(outcome, Completed | Failed):
            files.append(("summary.json", as_json(_outcome_summary(outcome)), JSON))
    except Exception as exc:  # noqa: BLE001 - these files must not fail an image that is stored
        claim = outcome.claim
        log.warning("a sidecar file of %s cannot be made: %s", ascii(claim.id.text)[:100], type(exc).__name__)
    return files


def _iteration_files(outcome: Completed | NeedsRefinement) -> Iterable[tuple[str, bytes, str]]:
    """Yield the name, content and content type of each file about the images of this claim."""
    import yaml

    iteration = outcome.iterations or 1
    images = [image for image in _kept_images(outcome) if image.iteration == iteration]
    if not images:
        return
    head = {"prompt_id": str(outcome.claim.id), "prompt": outcome.text, "iteration": iteration}
    results = as_json({**head, "pictures": [_image_document(image) for image in images]})
    yield f"iteration_{iteration}_results.json", results, JSON
    as_yaml = yaml.safe_dump(json.loads(results), sort_keys=False, allow_unicode=False)
    yield f"iteration_{iteration}_results.yaml", as_yaml.encode(), YAML
    evaluations = [
        {"image_url": image.image_url, "sha256": image.sha256, **image.evaluation.document}
        for image in images
        if image.evaluation is not None
    ]
    if evaluations:
        yield f"iteration_{iteration}_evaluation.json", as_json({**head, "evaluations": evaluations}), JSON


def _kept_images(outcome: Completed | NeedsRefinement) -> Sequence[StoredImage]:
    """Return all images that are kept of the prompt, also those of earlier iterations."""
    return outcome.tries or (outcome.images if isinstance(outcome, Completed) else ())


def _image_document(stored: StoredImage) -> Document:
    score = {} if stored.score is None else {"score": stored.score}
    return {
        "image_url": stored.image_url,
        "sha256": stored.sha256,
        **score,
        "drawn": stored.text,
        "truncated": stored.truncated,
        **stored.used,
    }


def _outcome_summary(outcome: Completed | Failed) -> Document:
    if isinstance(outcome, Failed):
        text = outcome.prompt.text
        return {
            "prompt_id": str(outcome.claim.id),
            "prompt": text if isinstance(text, str) else None,
            "status": "error",
            "error_code": outcome.code.value,
            "error": outcome.message,
        }
    return {
        "prompt_id": str(outcome.claim.id),
        "prompt": outcome.text,
        "status": "completed",
        "iterations": outcome.iterations or 1,
        "best": _image_document(outcome.first),
        "pictures": _brief_documents(_kept_images(outcome), outcome.first),
    }


def _brief_documents(images: Sequence[StoredImage], best: StoredImage) -> list[Document]:
    return [
        {
            "iteration": image.iteration,
            "image_url": image.image_url,
            "score": image.score,
            "best": image is best,
        }
        for image in images
    ]
