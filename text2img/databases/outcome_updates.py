"""The updates that an outcome makes to its prompt's document and its result, for every adapter.

The adapters themselves write ids and timestamps.
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
    UNSCORED_FIELD,
    WEBHOOK_ID,
    WEBHOOK_PENDING,
)
from text2img.databases.records import documents_of, merged_hashes
from text2img.errors import ErrorCode
from text2img.prompts import (
    APPROXIMATIONS,
    PROVIDER_METADATA_FIELDS,
    AwaitsScore,
    Claim,
    Completed,
    Failed,
    NeedsRefinement,
    Prompt,
    PromptId,
    Status,
    StoredImage,
)
from text2img.prompts.ids import gcs_url
from text2img.prompts.parameters import RECORDED_NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from text2img.prompts import Outcome

IDENTITY_FIELDS: Final = ("status", "run_id", "attempts", "sha256", "error_code", "iterations")
"""The fields of a prompt's document that identify an outcome that was recorded before."""
_MARKS: Final = ("untold", WEBHOOK_PENDING, WEBHOOK_ID)
_REFINED: Final = "refined_prompt"
"""The text of the image, if a loop used another one than the prompt's."""
_OPTIONAL_IN_RESULTS: Final = (
    *OPTIONAL_RESULT_FIELDS,
    *RECORDED_NAMES,
    *APPROXIMATIONS,
    "model_base",
    *PROVIDER_METADATA_FIELDS,
    _REFINED,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """An outcome's update of its prompt's document.

    ``fields`` are set and ``removed`` ones unset. ``timestamp`` names a field to set to the current time, if
    any. ``wait`` (seconds) sets ``not_before``.
    """

    fields: Mapping[str, object]
    removed: tuple[str, ...]
    timestamp: str | None
    wait: float | None = None


def result_of(done: Completed, run_id: str) -> dict[str, object]:
    """Return a completed prompt's result, without ``dataset_id`` and ``created_at``."""
    return {
        "prompt": done.text,
        "image_url": done.first.image_url,
        **_optional_fields(done),
        "gcs_url": gcs_url(done.first.image_url),
        "status": Status.COMPLETED.value,
        **_used(done),
        "run_id": run_id,
        "prompt_truncated": any(image.truncated for image in done.images),
        "claim_number": done.claim.number,
    }


def absent_from(done: Completed) -> tuple[str, ...]:
    """Return the fields that this result lacks but an earlier result of the prompt may have."""
    present = {**_used(done), **_optional_fields(done)}
    return tuple(name for name in _OPTIONAL_IN_RESULTS if name not in present)


def change_of(outcome: Outcome, run_id: str, *, notify: bool) -> Change:
    """Return the outcome's update of its prompt; ``notify`` marks a final outcome as undelivered."""
    if isinstance(outcome, Completed):
        return _completed(outcome, run_id, notify=notify)
    if isinstance(outcome, NeedsRefinement):
        return _needs_refinement(outcome)
    if isinstance(outcome, AwaitsScore):
        return _awaits_score(outcome)
    failure: dict[str, object] = {
        "error": outcome.message,
        "error_code": outcome.code.value,
        "attempts": outcome.attempts,
    }
    if isinstance(outcome, Failed):
        marks = _marks(outcome.prompt, notify=notify)
        hashes = _hashes(outcome.prompt, ())
        final = {"status": Status.ERROR.value, "run_id": run_id, **failure, **hashes, **marks}
        removed = (*CLAIM_FIELDS, "not_before", *SUCCESS_FIELDS, NEXT_PROMPT_FIELD)
        return Change(fields=final, removed=_removed(removed, marks), timestamp="error_at")
    pending = {"status": Status.PENDING.value, **failure}
    return Change(fields=pending, removed=_removed(CLAIM_FIELDS, {}), timestamp="error_at", wait=outcome.wait)


def unwritable_message(reason: str) -> str:
    """Return the message of a prompt whose document rejects a write."""
    return f"the document cannot be written back: {reason}"


def unwritable(outcome: Outcome, reason: str) -> Failed:
    """Return the failure of a prompt whose outcome the database rejects."""
    prompt = outcome.prompt
    return Failed(
        prompt=prompt,
        code=ErrorCode.INVALID_DOCUMENT,
        message=unwritable_message(reason),
        attempts=prompt.attempts,
    )


def probe(name: str) -> Completed:
    """Return an outcome like any other, of a prompt that does not exist."""
    claim = Claim(PromptId("str", name), name, 0)
    used = {"seed": 0, "num_inference_steps": 1, "guidance_scale": 1.0, "width": 64, "height": 64}
    image = StoredImage(image_url=f"file:///{name}.png", sha256="0" * 64, text=name, used=used)
    return Completed(prompt=Prompt(claim=claim, text=name), text=name, images=(image,))


def written_already(outcome: Outcome, run_id: str, fields: Mapping[str, object]) -> bool:
    """Return True if the document shows that this outcome was recorded before."""
    change = change_of(outcome, run_id, notify=False)
    identity = {name: value for name, value in change.fields.items() if name in IDENTITY_FIELDS}
    same = all(fields.get(name) == value for name, value in identity.items())
    return same and fields.get("claim_number") == outcome.claim.number


def _completed(done: Completed, run_id: str, *, notify: bool) -> Change:
    optional = _optional_fields(done)
    marks = _marks(done.prompt, notify=notify)
    hashes = _hashes(done.prompt, (*done.tries, *done.images))
    fields = {
        "status": Status.COMPLETED.value,
        "image_url": done.first.image_url,
        **optional,
        "sha256": done.first.sha256,
        **(hashes if hashes != {"sha256s": [done.first.sha256]} else {}),
        "run_id": run_id,
        "used": _used(done),
        **marks,
    }
    removed = (
        *CLAIM_FIELDS,
        *FAILURE_FIELDS,
        NEXT_PROMPT_FIELD,
        *(name for name in OPTIONAL_RESULT_FIELDS if name not in optional),
    )
    return Change(fields=fields, removed=_removed(removed, marks), timestamp="completed_at")


def _needs_refinement(outcome: NeedsRefinement) -> Change:
    """Return the update to pending; it keeps the deaths, since the next iteration may crash a worker too."""
    fields = {
        "status": Status.PENDING.value,
        "tries": documents_of(outcome.tries, None),
        "iterations": outcome.iterations,
        NEXT_PROMPT_FIELD: outcome.next_prompt,
        **_hashes(outcome.prompt, outcome.tries),
    }
    removed = (*CLAIM_FIELDS, *(name for name in FAILURE_FIELDS if name != "deaths"))
    return Change(fields=fields, removed=_removed(removed, {}), timestamp=None)


def _awaits_score(outcome: AwaitsScore) -> Change:
    """Return the update to pending; the prompt's earlier failures and deaths stay counted."""
    fields = {
        "status": Status.PENDING.value,
        UNSCORED_FIELD: documents_of(outcome.images, None),
        **_hashes(outcome.prompt, outcome.images),
    }
    return Change(fields=fields, removed=(*CLAIM_FIELDS, *_MARKS), timestamp=None)


def _hashes(prompt: Prompt, images: Sequence[StoredImage]) -> dict[str, object]:
    """Return the field with the hashes of all images recorded for the prompt, these included."""
    hashes = merged_hashes((*prompt.recorded_hashes, *(image.sha256 for image in images)))
    return {"sha256s": list(hashes)} if hashes else {}


def _used(done: Completed) -> dict[str, object]:
    """Return the parameters of the first image, with the units billed for all images (or all tries).

    The sum is left out if any image lacks its billed units.
    """
    units = [image.used.get("billed_units") for image in done.tries or done.images]
    billed = [unit for unit in units if isinstance(unit, float)]
    used = {name: value for name, value in done.first.used.items() if name != "billed_units"}
    if done.first.text != done.text:
        used[_REFINED] = done.first.text
    return {**used, "billed_units": sum(billed)} if len(billed) == len(units) else used


def score_fields(scores: Sequence[float | None], evaluation: Mapping[str, object]) -> dict[str, object]:
    """Return the fields of images that were scored later, as ``record`` would have written them."""
    several = {"scores": list(scores)} if len(scores) > 1 else {}
    return {"score": scores[0], "evaluation": dict(evaluation), **several}


def _optional_fields(done: Completed) -> dict[str, object]:
    """Return those of OPTIONAL_RESULT_FIELDS that the prompt has."""
    several = len(done.images) > 1
    optional: dict[str, object] = {}
    if several:
        optional["image_urls"] = [image.image_url for image in done.images]
    if done.tries:
        optional |= {"iterations": done.iterations, "tries": documents_of(done.tries, done.first)}
    evaluation = done.first.evaluation
    if evaluation is None:
        return optional
    optional["evaluation"] = evaluation.document
    if evaluation.score is not None:
        optional["score"] = evaluation.score
    if several:
        optional["scores"] = [image.evaluation and image.evaluation.score for image in done.images]
    return optional


def _marks(prompt: Prompt, *, notify: bool) -> dict[str, object]:
    """Return the marks that a final outcome must be delivered: to the callback, to the prompt's webhook.

    The webhook's notification gets its id here: however often it is created, it stays one notification.
    """
    undelivered: dict[str, object] = {"untold": True} if notify else {}
    if not isinstance(prompt.webhook_url, str):  # no valid URL
        return undelivered
    notification_id = webhook_id()
    return {**undelivered, WEBHOOK_PENDING: notification_id, WEBHOOK_ID: notification_id}


def _removed(names: tuple[str, ...], marks: Mapping[str, object]) -> tuple[str, ...]:
    return (*names, UNSCORED_FIELD, *(mark for mark in _MARKS if mark not in marks))
