"""Image generation by a model that fal hosts: over HTTP, without a local device, weights or torch.

This module holds the options, the limits of known models, and the interpretation of fal's answers.
``engine`` implements the Engine Protocol, ``queue_request`` takes one request through fal's queue, and
``http`` exchanges requests and decodes image files.
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
    from text2img.engine.hosted.queue_request import Answer


QUEUE: Final = "https://queue.fal.run"
PLATFORM: Final = "https://api.fal.ai"
LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "::1"})
_NAMESPACES: Final = frozenset({"workflows", "comfy"})
"""Names that may precede a model's owner; the URLs of such requests are one path segment longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedOptions:
    """The options of a hosted model: which of fal's models, and how to call it.

    ``url`` is the base URL of another service with fal's protocol. Times are in seconds: an HTTP request is
    retried for ``retry_timeout``; ``stall_timeout`` is the maximum time without progress of a queued request;
    ``timeout`` bounds one HTTP exchange, from the name lookup to the last byte. Decoding an image takes at
    most 8 bytes for each of ``max_pixels``.
    """

    model: str
    key: str = field(repr=False)
    url: str | None = None
    safety_checker: bool = True
    retry_timeout: float = 60
    stall_timeout: float = 300
    timeout: float = 30
    max_pixels: int = 4096**2

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\x21-\x7e]+", self.key):
            raise ConfigurationError(
                "the key contains characters that an HTTP header cannot carry; check --fal-ai-api-key"
            )
        if self.url is not None:
            _check_url(self.url)

    @property
    def queue(self) -> str:
        """The URL below which requests are submitted, without a trailing slash."""
        return (self.url or QUEUE).rstrip("/")

    @property
    def platform(self) -> str:
        """The URL below which prices are queried, without a trailing slash."""
        return (self.url or PLATFORM).rstrip("/")

    @property
    def app(self) -> str:
        """The model's owner and name, without further segments, as the URLs of its requests contain it."""
        parts = self.model.split("/")
        return "/".join(parts[: 3 if parts[0] in _NAMESPACES else 2])


def _check_url(url: str) -> None:
    """Raise ConfigurationError unless the URL is https://: the key is sent there. http:// needs loopback."""
    parts = urlsplit(url)
    is_local = parts.scheme == "http" and parts.hostname in LOOPBACK
    is_valid = re.fullmatch(r"https?://[^\s/@?#]+(/[^\s@?#]*)?", url)
    if not is_valid or not parts.hostname or not (is_local or parts.scheme == "https"):
        raise ConfigurationError(
            "--generator-url must be a URL like https://queue.example.com, without a user or a query (http://"
            " only for this machine itself)"
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """A model's own parameters (``requested``) and its maximum number of steps."""

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
    """Return the limits of a model by its name; the defaults for an unknown model."""
    return _KNOWN.get(model, Limits(RequestedParameters()))


_TRANSIENT_STATUSES: Final = frozenset({408, 425, 429})
_MAX_REASON_LENGTH: Final = 300


def is_transient(answer: Answer, *, final: bool = False) -> bool:
    """Return True if a retry may get another answer.

    ``final`` is True when a request's outcome was queried. A 5xx answer in the model's own form (an object
    with ``detail``) is then that outcome and permanent: fal has retried by itself before.
    """
    if answer.status < 500:
        return answer.status in _TRANSIENT_STATUSES
    return not (final and _detail(answer) is not None)


def json_content(answer: Answer) -> dict[str, Any]:
    """Return the object in a 2xx answer; raise PromptFailed (``generation_failed``) if there is none."""
    document = _object(answer)
    if document is None:
        raise malformed_answer("no JSON object")
    return document


def malformed_answer(found: str) -> PromptFailed:
    """Return the failure of a prompt whose answer contains ``found`` instead of what it should."""
    return PromptFailed(ErrorCode.GENERATION_FAILED, f"fal's answer is malformed: {found}")


def rejection(answer: Answer, model: str, key: str) -> ModelFailed | PromptFailed:
    """Return the failure for an answer that is neither 2xx nor transient."""
    reason = _reason(answer, key)
    if answer.status in {401, 403}:
        return ModelFailed(f"fal refuses the key ({answer.status}{reason}); check --fal-ai-api-key (FAL_KEY)")
    if answer.status == 402:
        return ModelFailed(f"fal requires payment (402{reason}); check the account's balance")
    if answer.status == 404:
        return ModelFailed(f"fal has no model {model} (404{reason}); check --generator")
    if 300 <= answer.status < 400:
        return ModelFailed(
            f"fal redirects ({answer.status}), and redirects are not followed; check --generator-url"
        )
    if answer.status in {400, 413, 422}:
        violates_policy = "content_policy_violation" in _error_types(answer)
        code = ErrorCode.SAFETY if violates_policy else ErrorCode.INVALID_PARAMETERS
        return PromptFailed(code, f"fal refuses the request ({answer.status}{reason})")
    return PromptFailed(ErrorCode.GENERATION_FAILED, f"fal answered {answer.status}{reason}")


def describe_price(answer: Answer) -> str:
    """Return the price of an image from the platform's answer, as text."""
    prices = (_object(answer) or {}).get("prices")
    first = prices[0] if isinstance(prices, list) and prices else None
    if not isinstance(first, dict) or not isinstance(first.get("unit_price"), int | float):
        return "its price is unknown"
    return printable_line(
        f"{first['unit_price']} {first.get('currency', '')} per {first.get('unit', 'unit')}", 80
    )


def billed_units(answer: Answer) -> float | None:
    """Return how many units of the model's price were billed; None if the answer does not contain it."""
    try:
        units = float(answer.headers.get("x-fal-billable-units", ""))
    except ValueError:
        return None
    return units if math.isfinite(units) and units >= 0 else None


def printable_line(text: str, max_length: int) -> str:
    """Return the text on one line, of printable characters only, cut to ``max_length``."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())[:max_length]


def _object(answer: Answer) -> dict[str, Any] | None:
    try:
        document = json.loads(answer.body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _detail(answer: Answer) -> object:
    return (_object(answer) or {}).get("detail")


def _error_types(answer: Answer) -> set[object]:
    """Return the types of the errors that a model's answer lists."""
    detail = _detail(answer)
    entries = [entry for entry in detail if isinstance(entry, dict)] if isinstance(detail, list) else []
    return {error_type for entry in entries if isinstance(error_type := entry.get("type"), str)}


def _reason(answer: Answer, key: str) -> str:
    """Return a colon and the service's own message, on one line, or "" if it sent none.

    URLs and the key are removed, because the message is stored.
    """
    detail = _detail(answer)
    if isinstance(detail, list):
        detail = "; ".join(_format_entry(entry) for entry in detail[:3] if isinstance(entry, dict))
    if not isinstance(detail, str):
        return ""
    message = printable_line(re.sub(r"\S+://\S+", "…", detail.replace(key, "***")), _MAX_REASON_LENGTH)
    return f": {message}" if message else ""


def _format_entry(entry: dict[str, Any]) -> str:
    location = entry.get("loc")
    name = ".".join(str(part) for part in location[1:]) if isinstance(location, list) else ""
    return f"{name} {entry.get('msg', '')}".strip()
