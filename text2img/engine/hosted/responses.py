"""What the answers of fal's queue mean: which pass, which end a prompt, which end the run. Asks nobody."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import ErrorCode, ModelFailed, PromptFailed

if TYPE_CHECKING:
    from text2img.engine.hosted.http import Answer

_PASSING: Final = frozenset({408, 425, 429})
_LONGEST_SAID: Final = 300


def passes(answer: Answer, *, final: bool = False) -> bool:
    """Whether it may be another answer if asked again.

    ``final``: the question is for a request's outcome. Then a failure in the model's own form (an object with
    ``detail``) is that outcome: fal has tried again by itself before.
    """
    if answer.status < 500:
        return answer.status in _PASSING
    return not (final and _detail(answer) is not None)


def content(answer: Answer) -> dict[str, Any]:
    """The object in a 2xx answer; PromptFailed (``generation_failed``) where there is none."""
    found = _object(answer)
    if found is None:
        raise malformed("no JSON object")
    return found


def malformed(what: str) -> PromptFailed:
    """What becomes of a prompt whose answer holds ``what`` in place of what it should."""
    return PromptFailed(ErrorCode.GENERATION_FAILED, f"fal's answer is malformed: {what}")


def refusal(answer: Answer, model: str, key: str) -> ModelFailed | PromptFailed:
    """What an answer means that is neither a success nor passes."""
    said = _said(answer, key)
    if answer.status in {401, 403}:
        return ModelFailed(f"fal refuses the key ({answer.status}{said}); check --fal-ai-api-key (FAL_KEY)")
    if answer.status == 402:
        return ModelFailed(f"fal wants to be paid (402{said}); see to the account's balance")
    if answer.status == 404:
        return ModelFailed(f"fal knows no model {model} (404{said}); check --generator")
    if 300 <= answer.status < 400:
        return ModelFailed(f"fal redirects ({answer.status}), which is not followed; check --generator-url")
    if answer.status in {400, 413, 422}:
        policy = "content_policy_violation" in _types(answer)
        code = ErrorCode.SAFETY if policy else ErrorCode.INVALID_PARAMETERS
        return PromptFailed(code, f"fal refuses the request ({answer.status}{said})")
    return PromptFailed(ErrorCode.GENERATION_FAILED, f"fal answered {answer.status}{said}")


def price(answer: Answer) -> str:
    """What a picture costs, as the platform's answer says it."""
    prices = (_object(answer) or {}).get("prices")
    first = prices[0] if isinstance(prices, list) and prices else None
    if not isinstance(first, dict) or not isinstance(first.get("unit_price"), int | float):
        return "its price is not told"
    return plain(f"{first['unit_price']} {first.get('currency', '')} per {first.get('unit', 'unit')}", 80)


def billed(answer: Answer) -> float | None:
    """Units of the model's price that were billed, where the answer tells it."""
    try:
        units = float(answer.headers.get("x-fal-billable-units", ""))
    except ValueError:
        return None
    return units if math.isfinite(units) and units >= 0 else None


def plain(text: str, longest: int) -> str:
    """The text on one line, of characters that every log and database takes, and not endless."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:longest]


def _object(answer: Answer) -> dict[str, Any] | None:
    try:
        found = json.loads(answer.body)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _detail(answer: Answer) -> object:
    return (_object(answer) or {}).get("detail")


def _types(answer: Answer) -> set[object]:
    """The kinds of error that a model's answer lists."""
    detail = _detail(answer)
    entries = [entry for entry in detail if isinstance(entry, dict)] if isinstance(detail, list) else []
    return {kind for entry in entries if isinstance(kind := entry.get("type"), str)}


def _said(answer: Answer, key: str) -> str:
    """The service's own words after a colon, on one line, without addresses and the key: they are kept."""
    detail = _detail(answer)
    if isinstance(detail, list):
        detail = "; ".join(_entry(entry) for entry in detail[:3] if isinstance(entry, dict))
    if not isinstance(detail, str):
        return ""
    words = plain(re.sub(r"\S+://\S+", "…", detail.replace(key, "***")), _LONGEST_SAID)
    return f": {words}" if words else ""


def _entry(entry: dict[str, Any]) -> str:
    where = entry.get("loc")
    name = ".".join(str(part) for part in where[1:]) if isinstance(where, list) else ""
    return f"{name} {entry.get('msg', '')}".strip()
