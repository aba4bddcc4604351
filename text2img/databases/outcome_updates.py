"""What an outcome makes of its prompt's document, and the result beside it, for every adapter.

Knows no database: ids and moments in time are written by the adapters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from text2img.databases import webhook_id
from text2img.databases.documents import (
    CLAIM_FIELDS,
    FAILURE_FIELDS,
    NEXT_PROMPT_FIELD,
    OPTIONAL_RESULT_FIELDS,
    SUCCESS_FIELDS,
    WEBHOOK_PENDING,
    documents_of,
)
from text2img.prompts import (
    APPROXIMATIONS,
    PROVIDER_METADATA_FIELDS,
    Completed,
    Failed,
    NeedsRefinement,
    Status,
)
from text2img.prompts.ids import gcs_url
from text2img.prompts.parameters import RECORDED_NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from text2img.prompts import Outcome, Prompt

IDENTITY_FIELDS: Final = ("status", "run_id", "attempts", "sha256", "error_code", "iterations")
"""By these fields of a prompt's document an outcome is recognised that was written down before."""
_REFINED: Final = "refined_prompt"
"""What was drawn, where a loop drew another text than the prompt's."""
_AT_TIMES_IN_RESULTS: Final = (
    *OPTIONAL_RESULT_FIELDS,
    *RECORDED_NAMES,
    *APPROXIMATIONS,
    *PROVIDER_METADATA_FIELDS,
    _REFINED,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What an outcome does to its prompt's document.

    ``moment`` is the field that receives the present time, if one does, ``wait`` (seconds) makes
    ``not_before``.
    """

    fields: Mapping[str, object]
    gone: tuple[str, ...]
    moment: str | None
    wait: float | None = None


def result_of(done: Completed, run_id: str) -> dict[str, object]:
    """A completed prompt's result, without ``dataset_id`` and ``created_at``."""
    return {
        "prompt": done.text,
        "image_url": done.first.image_url,
        **_more(done),
        "gcs_url": gcs_url(done.first.image_url),
        "status": Status.COMPLETED.value,
        **_used(done),
        "run_id": run_id,
        "prompt_truncated": any(image.truncated for image in done.pictures),
        "claim_number": done.claim.number,
    }


def absent_from(done: Completed) -> tuple[str, ...]:
    """Fields that a completed prompt's result lacks and an earlier one may have had."""
    used = {**_used(done), **_more(done)}
    return tuple(name for name in _AT_TIMES_IN_RESULTS if name not in used)


def change_of(outcome: Outcome, run_id: str, *, tell: bool) -> Change:
    """What the outcome does to its prompt's document; a final one is marked untold if ``tell``."""
    if isinstance(outcome, Completed):
        return _completed(outcome, run_id, tell=tell)
    if isinstance(outcome, NeedsRefinement):
        return _iterated(outcome)
    failure: dict[str, object] = {
        "error": outcome.message,
        "error_code": outcome.code.value,
        "attempts": outcome.attempts,
    }
    if isinstance(outcome, Failed):
        marks = _marks(outcome.prompt, tell=tell)
        final = {"status": Status.ERROR.value, "run_id": run_id, **failure, **marks}
        gone = (*CLAIM_FIELDS, "not_before", *SUCCESS_FIELDS, NEXT_PROMPT_FIELD)
        return Change(fields=final, gone=_gone(gone, marks), moment="error_at")
    again = {"status": Status.PENDING.value, **failure}
    return Change(fields=again, gone=_gone(CLAIM_FIELDS, {}), moment="error_at", wait=outcome.wait)


def written_already(outcome: Outcome, run_id: str, fields: Mapping[str, object]) -> bool:
    """Whether the document shows that this outcome was written down before."""
    change = change_of(outcome, run_id, tell=False)
    wanted = {name: value for name, value in change.fields.items() if name in IDENTITY_FIELDS}
    same = all(fields.get(name) == value for name, value in wanted.items())
    return same and fields.get("claim_number") == outcome.claim.number


def _completed(done: Completed, run_id: str, *, tell: bool) -> Change:
    more = _more(done)
    marks = _marks(done.prompt, tell=tell)
    fields = {
        "status": Status.COMPLETED.value,
        "image_url": done.first.image_url,
        **more,
        "sha256": done.first.sha256,
        "run_id": run_id,
        "used": _used(done),
        **marks,
    }
    gone = (
        *CLAIM_FIELDS,
        *FAILURE_FIELDS,
        NEXT_PROMPT_FIELD,
        *(name for name in OPTIONAL_RESULT_FIELDS if name not in more),
    )
    return Change(fields=fields, gone=_gone(gone, marks), moment="completed_at")


def _iterated(outcome: NeedsRefinement) -> Change:
    """Pending again: the deaths stay, since the next iteration may be as deadly."""
    fields = {
        "status": Status.PENDING.value,
        "tries": documents_of(outcome.tries, None),
        "iterations": outcome.iterations,
        NEXT_PROMPT_FIELD: outcome.next_prompt,
    }
    gone = (*CLAIM_FIELDS, *(name for name in FAILURE_FIELDS if name != "deaths"))
    return Change(fields=fields, gone=_gone(gone, {}), moment=None)


def _used(done: Completed) -> dict[str, object]:
    """What the first picture was made with, and what was billed for all of them (of a loop: for every try),
    where every one tells it.
    """
    units = [image.used.get("billed_units") for image in done.tries or done.pictures]
    told = [unit for unit in units if isinstance(unit, float)]
    others = {name: value for name, value in done.first.used.items() if name != "billed_units"}
    if done.first.text != done.text:
        others[_REFINED] = done.first.text
    return {**others, "billed_units": sum(told)} if len(told) == len(units) else others


def _more(done: Completed) -> dict[str, object]:
    """Where all pictures are, of a prompt that has several; what an evaluator said; the tries of a loop."""
    several = len(done.pictures) > 1
    more: dict[str, object] = {"image_urls": [one.image_url for one in done.pictures]} if several else {}
    if done.tries:
        more |= {"iterations": done.iterations, "tries": documents_of(done.tries, done.first)}
    first = done.first.evaluation
    if first is None:
        return more
    more["evaluation"] = first.document
    if first.score is not None:
        more["score"] = first.score
    if several:
        more["scores"] = [one.evaluation and one.evaluation.score for one in done.pictures]
    return more


def _marks(prompt: Prompt, *, tell: bool) -> dict[str, object]:
    """Who is to be told of a final outcome: the callback's receiver, the prompt's own webhook, both, nobody.

    A webhook's notice has its id from the moment of the outcome: however often it is made, it is one.
    """
    undelivered: dict[str, object] = {"untold": True} if tell else {}
    if not isinstance(prompt.webhook_url, str):  # no address that could ever be told
        return undelivered
    return {**undelivered, WEBHOOK_PENDING: webhook_id()}


def _gone(names: tuple[str, ...], marks: Mapping[str, object]) -> tuple[str, ...]:
    return (*names, *(mark for mark in ("untold", WEBHOOK_PENDING) if mark not in marks))
