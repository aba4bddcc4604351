"""What a document means, for every adapter: its fields become a prompt or a run, an outcome becomes fields.

Knows the documents of CONTRACT.md and no database: ids and moments in time are written by the adapters,
each in its own database's way.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from text2img.databases import Run, Untold, webhook_id
from text2img.errors import PromptFailed
from text2img.prompts import APPROXIMATIONS, Completed, Failed, Prompt, Status, Wishes
from text2img.prompts.checks import check_prompt_text
from text2img.prompts.parameters import PARAMETER_NAMES, RECORDED_NAMES
from text2img.prompts.places import gcs_url

if TYPE_CHECKING:
    from collections.abc import Mapping

    from text2img.databases import NewPrompt
    from text2img.prompts import Claim, Outcome, PromptId

CLAIM_FIELDS: Final = ("claimed_by", "claim_token", "lease_expires_at", "started_claim")
"""What a claim leaves in a prompt's document, and what goes with it; ``claim_number`` stays for ever."""
FAILURE_FIELDS: Final = ("error", "error_code", "error_at", "attempts", "deaths", "not_before")
_AT_TIMES: Final = ("image_urls", "score", "scores", "evaluation")
"""What only some completed prompts have: those with several pictures, or with an evaluator."""
SUCCESS_FIELDS: Final = ("image_url", "completed_at", "sha256", "used", *_AT_TIMES)
OWED: Final = "webhook_untold"
"""In a final prompt: the id of the notice for its own webhook, until that is kept."""
OUTCOME_FIELDS: Final = (*CLAIM_FIELDS, *FAILURE_FIELDS, *SUCCESS_FIELDS, "untold", OWED, "run_id")
"""What a prompt that is to be made as if new must not have."""
PROMPT_FIELDS: Final = (
    "text",
    "prompt_tags",
    "webhook_url",
    *PARAMETER_NAMES,
    "priority",
    "attempts",
    "deaths",
    "claim_number",
    "started_claim",
    "status",
)
"""Whatever a claim reads of a prompt's document."""
TOLD_FIELDS: Final = (
    *("text", "prompt_tags", "status", "image_url", "image_urls", "score", "used"),
    *("error_code", "error", "attempts"),
)
"""Whatever those who are told of an outcome hear comes from these."""

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What an outcome does to its prompt's document.

    ``moment`` is the field that receives the present time, ``wait`` (seconds) makes ``not_before``.
    """

    fields: Mapping[str, object]
    gone: tuple[str, ...]
    moment: str
    wait: float | None = None


COUNTABLE: Final = 2**53
"""Counters stay below it: there every whole number is exact in each of the databases' types."""


def count_of(value: object) -> int:
    """A counter's value; whatever can be no count (as another program may have left it) counts as none."""
    number = number_of(value)
    return int(number) if 0 <= number < COUNTABLE else 0


def number_of(value: object) -> float:
    """A number's value; whatever is no finite number counts as 0."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return value if numeric and math.isfinite(value) else 0  # type: ignore[arg-type,return-value]


def prompt_of(claim: Claim, fields: Mapping[str, object], deaths: int) -> Prompt:
    """The claimed prompt; its text and its wishes are taken as they stand."""
    return Prompt(
        claim=claim,
        text=fields.get("text"),
        prompt_tags=fields.get("prompt_tags"),
        webhook_url=fields.get("webhook_url"),
        wishes=Wishes.of(fields),
        priority=number_of(fields.get("priority")),
        attempts=count_of(fields.get("attempts")),
        deaths=deaths,
    )


def deaths_at_claim(fields: Mapping[str, object]) -> int:
    """The deaths of a candidate once it is claimed: one more if its last claim died on the device."""
    started = fields.get("started_claim")
    died = fields.get("status") == Status.PROCESSING and started is not None
    fell = died and started == fields.get("claim_number")
    return count_of(fields.get("deaths")) + (1 if fell else 0)


def readings(text: str) -> list[object]:
    """The values an id given as text may stand for: the text, and the number it reads as."""
    if not _NUMBER.fullmatch(text):
        return [text]
    number = float(text) if "." in text else int(text)
    fits = not isinstance(number, int) or -(2**63) <= number < 2**63
    return [text, number] if fits else [text]


def new_fields(prompt: NewPrompt) -> dict[str, object]:
    """The fields of a prompt that is added, without its id and ``created_at``."""
    given = {name: value for name, value in content_of(prompt).items() if value is not None}
    return {**given, "status": Status.PENDING.value}


def content_of(prompt: NewPrompt) -> dict[str, object]:
    """Whatever its owner may have written of a prompt; None for what is left out."""
    return {
        "text": prompt.text,
        "prompt_tags": None,  # a new prompt's text is what they came to
        "dataset_id": prompt.dataset_id,
        "priority": prompt.priority,
        "webhook_url": prompt.webhook_url,
        **{name: getattr(prompt.wishes, name) for name in PARAMETER_NAMES},
    }


def result_of(done: Completed, run_id: str) -> dict[str, object]:
    """A completed prompt's result, without ``dataset_id`` and ``created_at``."""
    return {
        "prompt": done.request.text,
        "image_url": done.image_url,
        **_more(done),
        "gcs_url": gcs_url(done.image_url),
        "status": Status.COMPLETED.value,
        **_used(done),
        "run_id": run_id,
        "prompt_truncated": done.truncated,
        "claim_number": done.claim.number,
    }


def absent_from(done: Completed) -> tuple[str, ...]:
    """Fields that a completed prompt's result lacks and an earlier one may have had."""
    used = {**_used(done), **_more(done)}
    return tuple(name for name in (*_AT_TIMES, *RECORDED_NAMES, *APPROXIMATIONS) if name not in used)


def change_of(outcome: Outcome, run_id: str, *, tell: bool) -> Change:
    """What the outcome does to its prompt's document; a final one is marked untold if ``tell``."""
    if isinstance(outcome, Completed):
        return _completed(outcome, run_id, tell=tell)
    failure: dict[str, object] = {
        "error": outcome.sentence,
        "error_code": outcome.code.value,
        "attempts": outcome.attempts,
    }
    if isinstance(outcome, Failed):
        marks = _marks(outcome.prompt, tell=tell)
        final = {"status": Status.ERROR.value, "run_id": run_id, **failure, **marks}
        gone = (*CLAIM_FIELDS, "not_before", *SUCCESS_FIELDS)
        return Change(fields=final, gone=_gone(gone, marks), moment="error_at")
    again = {"status": Status.PENDING.value, **failure}
    return Change(fields=again, gone=_gone(CLAIM_FIELDS, {}), moment="error_at", wait=outcome.wait)


def written_already(outcome: Outcome, run_id: str, fields: Mapping[str, object]) -> bool:
    """Whether the document shows that this outcome was written down before."""
    change = change_of(outcome, run_id, tell=False)
    marks = ("status", "run_id", "attempts", "sha256", "error_code")
    wanted = {name: value for name, value in change.fields.items() if name in marks}
    same = all(fields.get(name) == value for name, value in wanted.items())
    return same and fields.get("claim_number") == outcome.claim.number


def untold_of(prompt_id: PromptId, fields: Mapping[str, Any]) -> Untold:
    """What is to be told of a completed or failed prompt's document."""
    text = _prompt_text(fields)
    if fields.get("status") == Status.COMPLETED:
        used, urls = _object(fields.get("used")), fields.get("image_urls")
        return Untold(
            id=prompt_id,
            text=text,
            image_url=_text(fields.get("image_url")) or None,
            image_urls=tuple(map(_text, urls)) if isinstance(urls, list) else (),
            score=score if isinstance(score := fields.get("score"), float) else None,
            seed=_whole(used.get("seed")),
            steps=_whole(used.get("num_inference_steps")),
            guidance_scale=number_of(used.get("guidance_scale")) if "guidance_scale" in used else None,
        )
    return Untold(
        id=prompt_id,
        text=text,
        code=_text(fields.get("error_code")),
        sentence=_text(fields.get("error")),
        attempts=count_of(fields.get("attempts")),
    )


def run_fields(run: Run) -> dict[str, object]:
    """A run's document without its ``_id``; moments in time are datetimes."""
    names = ("host", "status", "started_at", "finished_at", "model", "completed", "failed", "images")
    pace = ("images_per_second", "steady_images_per_second")
    measured = (*pace, "device_busy", "device_busy_of_run", "peak_memory")
    plain: dict[str, object] = {name: getattr(run, name) for name in (*names, "postponed", *measured)}
    return {**plain, "seconds": dict(run.seconds), "versions": dict(run.versions)}


def run_of(run_id: str, fields: Mapping[str, Any]) -> Run | None:
    """The run of a document, or None where the document is no run of this job."""
    started, finished = fields.get("started_at"), fields.get("finished_at")
    if not isinstance(started, datetime):
        return None
    return Run(
        id=run_id,
        started_at=started,
        host=str(fields.get("host") or ""),
        status=str(fields.get("status") or ""),
        finished_at=finished if isinstance(finished, datetime) else None,
        model=fields.get("model"),
        completed=count_of(fields.get("completed")),
        failed=count_of(fields.get("failed")),
        images=count_of(fields.get("images")),
        postponed=count_of(fields.get("postponed")),
        images_per_second=number_of(fields.get("images_per_second")),
        steady_images_per_second=number_of(fields.get("steady_images_per_second")),
        device_busy=number_of(fields.get("device_busy")),
        device_busy_of_run=number_of(fields.get("device_busy_of_run")),
        peak_memory=count_of(fields.get("peak_memory")),
        seconds=_object(fields.get("seconds")),
        versions=_object(fields.get("versions")),
    )


def _completed(done: Completed, run_id: str, *, tell: bool) -> Change:
    more = _more(done)
    marks = _marks(done.request.prompt, tell=tell)
    fields = {
        "status": Status.COMPLETED.value,
        "image_url": done.image_url,
        **more,
        "sha256": done.sha256,
        "run_id": run_id,
        "used": _used(done),
        **marks,
    }
    gone = (*CLAIM_FIELDS, *FAILURE_FIELDS, *(name for name in _AT_TIMES if name not in more))
    return Change(fields=fields, gone=_gone(gone, marks), moment="completed_at")


def _used(done: Completed) -> dict[str, object]:
    used = done.request.parameters.recorded
    return {**used, "scheduler": done.scheduler, "model": done.model, **done.approximations}


def _more(done: Completed) -> dict[str, object]:
    """Where all pictures are, of a prompt that has several; what an evaluator said."""
    more: dict[str, object] = {"image_urls": list(done.image_urls)} if done.image_urls else {}
    if not done.evaluations:
        return more
    first, *rest = done.evaluations
    more["evaluation"] = first.document
    if first.score is not None:
        more["score"] = first.score
    if rest:
        more["scores"] = [evaluation.score for evaluation in done.evaluations]
    return more


def _marks(prompt: Prompt, *, tell: bool) -> dict[str, object]:
    """Who is to be told of a final outcome: the callback's receiver, the prompt's own webhook, both, nobody.

    A webhook's notice has its id from the moment of the outcome: however often it is made, it is one.
    """
    untold: dict[str, object] = {"untold": True} if tell else {}
    if not isinstance(prompt.webhook_url, str):  # no address that could ever be told
        return untold
    return {**untold, OWED: webhook_id()}


def _gone(names: tuple[str, ...], marks: Mapping[str, object]) -> tuple[str, ...]:
    return (*names, *(mark for mark in ("untold", OWED) if mark not in marks))


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _prompt_text(fields: Mapping[str, Any]) -> object:
    """The text that is drawn; what stands in its place where that is none."""
    try:
        return check_prompt_text(fields.get("text"), fields.get("prompt_tags"))
    except PromptFailed:
        return fields.get("text")


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
