"""The body of one entry, which never changes once it is made. Knows neither HTTP nor database."""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from text2img import __version__
from text2img.errors import ConfigurationError, ErrorCode
from text2img.prompts.ids import gcs_url

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from text2img.databases import Notification, UndeliveredOutcome


_LONGEST_BODY = 8_000_000
"""Bytes: half of what one MongoDB document holds, and more than most receivers take."""
_LONGEST_SENTENCE = 10_000
"""Characters of an error."""


def callback_payload(run_id: str, status: str, outcomes: Sequence[UndeliveredOutcome], *, final: bool) -> str:
    """The entry's body: JSON, in ASCII only (all else is escaped, lone surrogates too), without NaN.

    Should it become larger than 8 MB, ``image_urls`` are left out, whose names follow from the first one's;
    should that not do, every prompt and error is cut to an equal length and ends in ``…``.
    """
    body = _body(run_id, status, outcomes, final=final)
    if len(body) > _LONGEST_BODY:
        outcomes = [replace(outcome, image_urls=()) for outcome in outcomes]
        body = _body(run_id, status, outcomes, final=final)
    if len(body) > _LONGEST_BODY and outcomes:
        # A character takes at most 12 bytes (two escaped surrogates), and an outcome has two texts.
        longest = _LONGEST_BODY // (len(outcomes) * 24)
        body = _body(run_id, status, outcomes, final=final, longest=longest)
    return body


def webhook_payload(outcome: UndeliveredOutcome) -> tuple[str, str]:
    """What a prompt's own webhook is told of its outcome: the last word of the URL, and the body."""
    document: dict[str, object] = {"generation_id": str(outcome.id)}
    if outcome.code is not None:
        # Whoever was abandoned had no try of its own this time.
        before = outcome.attempts - (outcome.code != ErrorCode.ABANDONED)
        document["error_message"] = _text(outcome.message, _LONGEST_SENTENCE)
        document["error_code"] = outcome.code.upper()
        document["retry_count"] = max(0, before)
        return "failed", _json(document)
    document["result_url"] = outcome.image_url
    if len(outcome.image_urls) > 1:
        document["result_urls"] = list(outcome.image_urls)
    document["metadata"] = {
        "seed": outcome.seed,
        "steps": outcome.steps,
        "guidance_scale": outcome.guidance_scale,
    }
    return "complete", _json(document)


def _body(
    run_id: str,
    status: str,
    outcomes: Sequence[UndeliveredOutcome],
    *,
    final: bool,
    longest: int | None = None,
) -> str:
    results = [_result(outcome, longest) for outcome in outcomes if outcome.code is None]
    errors = [_error(outcome, longest) for outcome in outcomes if outcome.code is not None]
    document = {
        "run_id": run_id,
        "status": status,
        "final": final,
        "results": results,
        "errors": errors,
        "counts": {"completed": len(results), "error": len(errors)},
    }
    return _json(document)


def _json(document: Mapping[str, object]) -> str:
    return json.dumps(document, ensure_ascii=True, allow_nan=False)


def _result(outcome: UndeliveredOutcome, longest: int | None) -> dict[str, object]:
    url = outcome.image_url
    return {
        "prompt_id": str(outcome.id),
        "record_id": str(outcome.id),  # a result is known by its prompt's id
        "prompt": _text(outcome.text, longest),
        "image_url": url,
        **({"image_urls": list(outcome.image_urls)} if outcome.image_urls else {}),
        "gcs_url": gcs_url(url),
        "seed": outcome.seed,
        **({"score": outcome.score} if outcome.score is not None else {}),
        **({"iterations": outcome.iterations} if outcome.iterations else {}),
    }


def _error(outcome: UndeliveredOutcome, longest: int | None) -> dict[str, object]:
    return {
        "prompt_id": str(outcome.id),
        "prompt": _text(outcome.text, longest),
        "error_code": outcome.code,
        "error": _text(outcome.message, longest),
    }


def _text(text: object, longest: int | None) -> str | None:
    """The text, cut where it must be; None for what is no text, which a failed prompt's may be."""
    if not isinstance(text, str) or longest is None or len(text) <= longest:
        return text if isinstance(text, str) else None
    return f"{text[:longest]}…"


class Credentials:
    """``secret`` (``whsec_…``) signs; ``token`` goes as a bearer token. Either may be absent.

    Raises ConfigurationError for one that cannot be used, without showing it.
    """

    def __init__(self, secret: str | None = None, token: str | None = None) -> None:
        self._key = None if secret is None else _key(secret)
        self.token = None if token is None else _check_token(token)

    def headers(self, notification: Notification | None) -> dict[str, str]:
        """The headers for a notice, or for a request without a body; the token is not among them."""
        headers = {"User-Agent": f"text2img/{__version__}"}
        if notification is None:
            return headers
        now = datetime.now(UTC)
        headers["Content-Type"] = "application/json"
        headers["webhook-id"] = notification.id
        headers["webhook-timestamp"] = str(int(now.timestamp()))
        if self._key is not None:
            from standardwebhooks import Webhook

            headers["webhook-signature"] = Webhook(self._key).sign(notification.id, now, notification.body)
        return headers


def _key(secret: str) -> bytes:
    """The signing key in ``whsec_`` and base64. Checked here: the library skips what is no base64."""
    prefix, _, encoded = secret.strip().partition("_")
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if prefix != "whsec" or not key:
        raise ConfigurationError("the callback secret is not whsec_ and base64; check --callback-secret")
    return key


def _check_token(token: str) -> str:
    token = token.strip()
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigurationError("the callback token holds what no header can carry; check --callback-token")
    return token
