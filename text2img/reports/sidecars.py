"""What is written beside the pictures in a layout of folders: an iteration's results, a prompt's summary.

A file is stored as a picture is: whole or not at all, made again with the same content after a crash. Knows
outcomes and names; the storage says what a file becomes.
"""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import TYPE_CHECKING

from text2img.errors import ClaimLost, PromptFailed
from text2img.prompts import Completed, Failed, Iterated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from text2img.prompts import Claim, Outcome, Stored
    from text2img.prompts.object_names import TryName
    from text2img.storage import ImageStorage

    Document = Mapping[str, object]

log = logging.getLogger(__name__)

JSON = "application/json"
YAML = "application/yaml"


class Sidecars:
    """Stores the files that tell of outcomes. ``holds``: whether a claim still does. Safe to use from several
    threads.
    """

    def __init__(self, storage: ImageStorage, names: TryName, holds: Callable[[Claim], bool]) -> None:
        self._storage, self._names, self._holds = storage, names, holds

    def write(self, outcome: Outcome) -> None:
        """Store what there is to say of an outcome that is about to be recorded; nothing of one that will be
        tried again. Raises StorageFailed; a file that is refused for itself is left out, with a warning.
        """
        put = partial(self._put, outcome.claim, self._names.folder(outcome.claim.id))
        try:
            if isinstance(outcome, Completed | Iterated):
                for name, data, kind in _of_iteration(outcome):
                    put(name, data, kind)
            if isinstance(outcome, Completed | Failed):
                put("summary.json", as_json(_summary(outcome)), JSON)
        except ClaimLost:  # recording will find that out as well, and drop the outcome
            return
        except PromptFailed as exc:
            log.warning("a file beside the pictures of %s is left out: %s", outcome.claim.id, exc)

    def _put(self, claim: Claim, folder: str, name: str, data: bytes, kind: str) -> None:
        self._storage.put(f"{folder}/{name}", data, kind, partial(self._holds, claim))


def as_json(document: object) -> bytes:
    """JSON for people: indented, in ASCII; all else is escaped, lone surrogates too, which an id may hold."""
    return (json.dumps(document, ensure_ascii=True, allow_nan=False, indent=2) + "\n").encode()


def _of_iteration(outcome: Completed | Iterated) -> Iterable[tuple[str, bytes, str]]:
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


def _pictures(outcome: Completed | Iterated) -> Sequence[Stored]:
    """All that is kept of the prompt, also of earlier iterations."""
    return outcome.tries or (outcome.pictures if isinstance(outcome, Completed) else ())


def _picture(stored: Stored) -> Document:
    score = {} if stored.score is None else {"score": stored.score}
    return {
        "image_url": stored.image_url,
        "sha256": stored.sha256,
        **score,
        "drawn": stored.text,
        "truncated": stored.truncated,
        **stored.used,
    }


def _summary(outcome: Completed | Failed) -> Document:
    if isinstance(outcome, Failed):
        text = outcome.prompt.text
        return {
            "prompt_id": str(outcome.claim.id),
            "prompt": text if isinstance(text, str) else None,
            "status": "error",
            "error_code": outcome.code.value,
            "error": outcome.sentence,
        }
    return {
        "prompt_id": str(outcome.claim.id),
        "prompt": outcome.text,
        "status": "completed",
        "iterations": outcome.iterations or 1,
        "best": _picture(outcome.first),
        "pictures": _in_short(_pictures(outcome), outcome.first),
    }


def _in_short(pictures: Sequence[Stored], best: Stored) -> list[Document]:
    return [
        {"iteration": each.iteration, "image_url": each.image_url, "score": each.score, "best": each is best}
        for each in pictures
    ]
