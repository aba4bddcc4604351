"""Pictures by a model that somebody else hosts: no device and no weights here, only HTTP.

``engine`` keeps the Engine Protocol, ``errand`` takes one request through the service's queue, ``answers``
says what its answers mean, ``wire`` speaks HTTP, ``files`` reads the pictures. Imports no torch at all.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from text2img.errors import ConfigurationError, ErrorCode, ModelFailed, PromptFailed
from text2img.prompts.parameters import RequestedParameters

if TYPE_CHECKING:
    from text2img.engine.hosted.http import Answer


QUEUE: Final = "https://queue.fal.run"
PLATFORM: Final = "https://api.fal.ai"
LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_APART: Final = frozenset({"workflows", "comfy"})
"""What may stand before a model's owner: there the requests' addresses are one name longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedOptions:
    """Which of fal's models draws, and how it is asked.

    ``url`` is that of another service that speaks like it. ``patience``: seconds for which one question is
    asked again while there is no answer. ``stall_timeout``: seconds that a request may stay as it is.
    ``timeout``: seconds for one exchange, from the name lookup to the last byte.
    """

    model: str
    key: str = field(repr=False)
    url: str | None = None
    safety_checker: bool = True
    patience: float = 60
    stall_timeout: float = 300
    timeout: float = 30

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\x21-\x7e]+", self.key):
            raise ConfigurationError("the key holds what no header can carry; check --fal-ai-api-key")
        if self.url is not None:
            _check_url(self.url)

    @property
    def queue(self) -> str:
        """Where requests are submitted, without a slash at its end."""
        return (self.url or QUEUE).rstrip("/")

    @property
    def platform(self) -> str:
        """Where prices are told, without a slash at its end."""
        return (self.url or PLATFORM).rstrip("/")

    @property
    def app(self) -> str:
        """The model's name without what comes after owner and name: by this its requests are found again."""
        parts = self.model.split("/")
        return "/".join(parts[: 3 if parts[0] in _APART else 2])


def _check_url(url: str) -> None:
    """The key goes there: in the clear only to this machine."""
    parts = urlsplit(url)
    plain = parts.scheme == "http" and parts.hostname in LOOPBACK
    whole = re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url)
    if not whole or not parts.hostname or not (plain or parts.scheme == "https"):
        raise ConfigurationError(
            "--generator-url must read like https://queue.example.com, without a user or a query (http://"
            " only for this machine itself)"
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """``wishes``: what a model uses by itself. ``longest``: the most steps."""

    requested: RequestedParameters
    max_steps: int = 1000


_SCHNELL: Final = Limits(RequestedParameters(num_inference_steps=4, guidance_scale=3.5), max_steps=12)
_DEV: Final = Limits(RequestedParameters(num_inference_steps=28, guidance_scale=3.5), max_steps=50)
_KNOWN: Final = {
    "fal-ai/flux/schnell": _SCHNELL,
    "fal-ai/flux-1/schnell": _SCHNELL,
    "fal-ai/flux/dev": _DEV,
    "fal-ai/flux-1/dev": _DEV,
}


def limits(model: str) -> Limits:
    """Those of a model by its name."""
    return _KNOWN.get(model, Limits(RequestedParameters()))


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


def plain(text: str, max_steps: int) -> str:
    """The text on one line, of characters that every log and database takes, and not endless."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:max_steps]


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
