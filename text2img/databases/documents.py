"""What a document means, for every adapter: its fields become a prompt, or what is to be told of it.

Knows the documents of CONTRACT.md and no database: ids and moments in time are written by the adapters,
each in its own database's way.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

from text2img.databases import Untold
from text2img.databases.candidates import tries_of
from text2img.errors import PromptFailed
from text2img.prompts import Prompt, Status, Wishes
from text2img.prompts.parameters import PARAMETER_NAMES
from text2img.prompts.validation import check_prompt_text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from text2img.databases import NewPrompt
    from text2img.prompts import Claim, PromptId

CLAIM_FIELDS: Final = ("claimed_by", "claim_token", "lease_expires_at", "started_claim")
"""What a claim leaves in a prompt's document, and what goes with it; ``claim_number`` stays for ever."""
FAILURE_FIELDS: Final = ("error", "error_code", "error_at", "attempts", "deaths", "not_before")
AT_TIMES: Final = ("image_urls", "score", "scores", "evaluation", "iterations", "tries")
"""What only some completed prompts have: those with several pictures, an evaluator, or a loop."""
NEXT: Final = "next_prompt"
"""In a pending prompt: what the next iteration of its loop draws."""
SUCCESS_FIELDS: Final = ("image_url", "completed_at", "sha256", "used", *AT_TIMES)
OWED: Final = "webhook_untold"
"""In a final prompt: the id of the notice for its own webhook, until that is kept."""
OUTCOME_FIELDS: Final = (*CLAIM_FIELDS, *FAILURE_FIELDS, *SUCCESS_FIELDS, NEXT, "untold", OWED, "run_id")
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
    "tries",
    NEXT,
)
"""Whatever a claim reads of a prompt's document."""
TOLD_FIELDS: Final = (
    *("text", "prompt_tags", "status", "image_url", "image_urls", "score", "iterations", "used"),
    *("error_code", "error", "attempts"),
)
"""Whatever those who are told of an outcome hear comes from these."""

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


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


def object_of(value: object) -> dict[str, Any]:
    """An object's fields; whatever is no object has none."""
    return value if isinstance(value, dict) else {}


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
        tries=tries_of(fields.get("tries")),
        next_prompt=_text(fields.get(NEXT)) or None,
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
        "style_id": prompt.style_id,
        **{name: getattr(prompt.wishes, name) for name in PARAMETER_NAMES},
    }


def untold_of(prompt_id: PromptId, fields: Mapping[str, Any]) -> Untold:
    """What is to be told of a completed or failed prompt's document."""
    text = drawn_text(fields)
    if fields.get("status") == Status.COMPLETED:
        used, urls = object_of(fields.get("used")), fields.get("image_urls")
        return Untold(
            id=prompt_id,
            text=text,
            image_url=_text(fields.get("image_url")) or None,
            image_urls=tuple(map(_text, urls)) if isinstance(urls, list) else (),
            score=score if isinstance(score := fields.get("score"), float) else None,
            iterations=_whole(fields.get("iterations")),
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


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def drawn_text(fields: Mapping[str, Any]) -> object:
    """The text that is drawn; what stands in its place where that is none."""
    try:
        return check_prompt_text(fields.get("text"), fields.get("prompt_tags"))
    except PromptFailed:
        return fields.get("text")


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
