"""Files that a run in a layout of folders writes beside its images: summary, sheets, sidecars."""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import TYPE_CHECKING, Final

from text2img.databases.documents import run_fields
from text2img.errors import ClaimLost, PromptFailed
from text2img.images.contact_sheet import Candidate, Row, contact_sheets, histogram
from text2img.prompts import Completed, Failed, NeedsRefinement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from text2img.databases import CompletedPrompt, Results, Run, Selection
    from text2img.prompts import Claim, Outcome, StoredImage
    from text2img.prompts.ids import IterationFolderName
    from text2img.prompts.refinement import Loop
    from text2img.storage import ImageStorage


log = logging.getLogger(__name__)

MOST: Final = 600
"""Pictures on contact sheets, or a few more: each is read for them, at the end of every run."""
_PRIVATE: Final = ("host", "worker", "execution", "gpu_hour_price")
"""What a run's document says of whoever ran it; the summary may be as public as the pictures."""


class RunSummary:
    """Writes it, as often as there is something new; what is there from the time before is replaced.

    ``check`` is called before each picture is read, and raises what ends the run.
    """

    def __init__(self, archive: Results, storage: ImageStorage, check: Callable[[], None]) -> None:
        self._archive, self._storage, self._check = archive, storage, check

    def write(self, run: Run, selection: Selection, loop: Loop | None) -> None:
        """Write all of it. Raises StorageFailed and DatabaseFailed."""
        self._put("summary.json", as_json(_summary(run, loop)), JSON)
        self._sheets(selection)
        self._scores(selection, loop)

    def _sheets(self, selection: Selection) -> None:
        made: list[CompletedPrompt] = []
        pictures = 0
        for each in self._archive.completed(selection):
            if pictures >= MOST:
                log.info("the contact sheets show %d prompts; a report shows all", len(made))
                break
            made.append(each)
            pictures += len(each.tries or each.image_urls)
        rows = (self._row(each) for each in sorted(made, key=lambda each: each.id.name))
        for number, page in enumerate(contact_sheets(rows), 1):
            self._put(f"contact-sheet{f'-{number}' if number > 1 else ''}.png", page, "image/png")

    def _scores(self, selection: Selection, loop: Loop | None) -> None:
        """The best score of each prompt; nothing where no evaluator has said anything."""
        scores = [each.scores[0] if each.scores else None for each in self._archive.completed(selection)]
        if any(score is not None for score in scores):
            page = histogram(scores, min_score=None if loop is None else loop.min_score)
            self._put("scores.png", page, "image/png")

    def _row(self, made: CompletedPrompt) -> Row:
        if made.tries:
            return Row(made.text, tuple(self._try(each) for each in made.tries))
        seed, scores = made.used.get("seed"), made.scores or (None,) * len(made.image_urls)
        return Row(
            made.text,
            tuple(
                Candidate(
                    1, seed + number if isinstance(seed, int) else 0, score, False, partial(self._read, url)
                )
                for number, (url, score) in enumerate(zip(made.image_urls, scores, strict=False))
            ),
        )

    def _try(self, said: Mapping[str, object]) -> Candidate:
        iteration, seed, score = (said.get(name) for name in ("iteration", "seed", "score"))
        return Candidate(
            iteration if isinstance(iteration, int) else 1,
            seed if isinstance(seed, int) else 0,
            float(score) if isinstance(score, int | float) else None,
            said.get("best") is True,
            partial(self._read, str(said.get("image_url"))),
        )

    def _read(self, url: str) -> bytes:
        self._check()
        return self._storage.read(url)

    def _put(self, name: str, data: bytes, kind: str) -> None:
        self._storage.put(name, data, kind, lambda: True)


def _summary(run: Run, loop: Loop | None) -> Mapping[str, object]:
    """The run as its document says it, and its loop."""
    fields = {
        name: value.isoformat() if hasattr(value, "isoformat") else value
        for name, value in run_fields(run, 0).items()
        if name not in _PRIVATE
    }
    asked = {name: getattr(loop, name) for name in ("iterations", "candidates", "min_score")} if loop else {}
    return {"run_id": run.id, **fields, **({"loop": asked} if asked else {})}


if TYPE_CHECKING:
    Document = Mapping[str, object]


JSON = "application/json"
YAML = "application/yaml"


class Sidecars:
    """Stores the files that tell of outcomes. ``holds``: whether a claim still does. Safe to use from several
    threads.
    """

    def __init__(
        self, storage: ImageStorage, names: IterationFolderName, holds: Callable[[Claim], bool]
    ) -> None:
        self._storage, self._names, self._holds = storage, names, holds

    def write(self, outcome: Outcome) -> None:
        """Store what there is to say of an outcome that is about to be recorded; nothing of one that will be
        tried again. Raises StorageFailed; a file that is refused for itself is left out, with a warning.
        """
        put = partial(self._put, outcome.claim, self._names.folder(outcome.claim.id))
        try:
            if isinstance(outcome, Completed | NeedsRefinement):
                for name, data, kind in _of_iteration(outcome):
                    put(name, data, kind)
            if isinstance(outcome, Completed | Failed):
                put("summary.json", as_json(_outcome_summary(outcome)), JSON)
        except ClaimLost:  # recording will find that out as well, and drop the outcome
            return
        except PromptFailed as exc:
            log.warning("a file beside the pictures of %s is left out: %s", outcome.claim.id, exc)

    def _put(self, claim: Claim, folder: str, name: str, data: bytes, kind: str) -> None:
        self._storage.put(f"{folder}/{name}", data, kind, partial(self._holds, claim))


def as_json(document: object) -> bytes:
    """JSON for people: indented, in ASCII; all else is escaped, lone surrogates too, which an id may hold."""
    return (json.dumps(document, ensure_ascii=True, allow_nan=False, indent=2) + "\n").encode()


def _of_iteration(outcome: Completed | NeedsRefinement) -> Iterable[tuple[str, bytes, str]]:
    """The names, contents and kinds of the files about what was made under this claim."""
    import yaml

    iteration = outcome.iterations or 1
    made = [each for each in _pictures(outcome) if each.iteration == iteration]
    if not made:
        return
    head = {"prompt_id": str(outcome.claim.id), "prompt": outcome.text, "iteration": iteration}
    results = as_json({**head, "pictures": [_picture(each) for each in made]})
    yield f"iteration_{iteration}_results.json", results, JSON
    same = yaml.safe_dump(json.loads(results), sort_keys=False, allow_unicode=False)
    yield f"iteration_{iteration}_results.yaml", same.encode(), YAML
    judged = [
        {"image_url": each.image_url, "sha256": each.sha256, **each.evaluation.document}
        for each in made
        if each.evaluation is not None
    ]
    if judged:
        yield f"iteration_{iteration}_evaluation.json", as_json({**head, "evaluations": judged}), JSON


def _pictures(outcome: Completed | NeedsRefinement) -> Sequence[StoredImage]:
    """All that is kept of the prompt, also of earlier iterations."""
    return outcome.tries or (outcome.images if isinstance(outcome, Completed) else ())


def _picture(stored: StoredImage) -> Document:
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
        "best": _picture(outcome.first),
        "pictures": _in_short(_pictures(outcome), outcome.first),
    }


def _in_short(pictures: Sequence[StoredImage], best: StoredImage) -> list[Document]:
    return [
        {"iteration": each.iteration, "image_url": each.image_url, "score": each.score, "best": each is best}
        for each in pictures
    ]
