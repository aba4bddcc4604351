"""Bodies and headers of notifications. A body never changes once it is made."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from text2img import __version__
from text2img.errors import ConfigurationError, ErrorCode
from text2img.prompts.ids import gcs_url
from text2img.prompts.quoting import json_text, json_value

if TYPE_CHECKING:
    from collections.abc import Sequence

    from text2img.databases import Notification, UndeliveredOutcome

log = logging.getLogger(__name__)

_MAX_BODY = 8_000_000
"""Bytes: half of what one MongoDB document holds, and more than most receivers accept."""
_MAX_ERROR_LENGTH = 10_000
"""Characters of an error message in a webhook."""


def callback_payload(run_id: str, status: str, outcomes: Sequence[UndeliveredOutcome], *, final: bool) -> str:
    """Return the notification's body, as JSON in ASCII. What JSON has no form for is null or text.

    If it is larger than 8 MB, ``image_urls`` are left out, whose names follow from the first one's. If that
    is not enough, every prompt and error message is cut to the same length and ends in ``…``.
    """
    body = _body(run_id, status, outcomes, final=final)
    if len(body) > _MAX_BODY:
        outcomes = [replace(outcome, image_urls=()) for outcome in outcomes]
        body = _body(run_id, status, outcomes, final=final)
    if len(body) > _MAX_BODY and outcomes:
        # A character takes at most 12 bytes (two escaped surrogates), and an outcome has two texts.
        max_length = _MAX_BODY // (len(outcomes) * 24)
        body = _body(run_id, status, outcomes, final=final, max_length=max_length)
    if len(body) > _MAX_BODY and outcomes:  # an id, a URL or a code that another program has written
        body = json_text(_shortened(json.loads(body), _MAX_BODY // (len(outcomes) * 200)))
    return body


def split_payload(body: str) -> tuple[str, str] | None:
    """Return two bodies with half of the outcomes each, of which the first is not final.

    None for a body with a single outcome, and for one that is not a callback's. The same body is always
    split in the same way. Fields that this version does not know are in both.
    """
    try:
        document = json.loads(body)
        outcomes = [(name, entry) for name in ("results", "errors") for entry in document.get(name, [])]
        middle = (len(outcomes) + 1) // 2
        first = _with_outcomes({**document, "final": False}, outcomes[:middle])
        second = _with_outcomes(document, outcomes[middle:])
    except Exception:  # noqa: BLE001 - whatever the database holds, only this notification is rejected
        return None
    return (first, second) if len(outcomes) > 1 else None


def _with_outcomes(document: dict[str, object], outcomes: Sequence[tuple[str, object]]) -> str:
    results, errors = ([entry for kind, entry in outcomes if kind == name] for name in ("results", "errors"))
    counts = {"completed": len(results), "error": len(errors)}
    return json_text({**document, "results": results, "errors": errors, "counts": counts})


def webhook_payload(outcome: UndeliveredOutcome) -> tuple[str, str]:
    """Return the endpoint (the last part of the URL) and the body for a prompt's own webhook."""
    endpoint = "complete" if outcome.code is None else "failed"
    try:
        document = _webhook_document(outcome)
        body = json_text(document)
        if len(body) > _MAX_BODY:
            document.pop("result_urls", None)  # their names follow from the first one's
            body = json_text(_shortened(document, _MAX_ERROR_LENGTH))
    except Exception as exc:  # noqa: BLE001 - one outcome must not hold back the others
        log.warning("the webhook of a prompt is sent in part: %s", type(exc).__name__)
        body = json_text({"generation_id": _shortened(outcome.id.json, _MAX_ERROR_LENGTH)})
    return endpoint, body


def _webhook_document(outcome: UndeliveredOutcome) -> dict[str, object]:
    document: dict[str, object] = {"generation_id": outcome.id.json}
    if outcome.code is not None:
        # The attempt that failed is no retry; an abandoned prompt had no attempt this time.
        retries = outcome.attempts - (outcome.code != ErrorCode.ABANDONED)
        document["error_message"] = _text(outcome.message, _MAX_ERROR_LENGTH)
        document["error_code"] = outcome.code.upper()
        document["retry_count"] = max(0, retries)
        return document
    document["result_url"] = outcome.image_url
    if len(outcome.image_urls) > 1:
        document["result_urls"] = list(outcome.image_urls)
    document["metadata"] = {
        "seed": _number(outcome.seed),
        "steps": _number(outcome.steps),
        "guidance_scale": _number(outcome.guidance_scale),
    }
    return document


def _body(
    run_id: str,
    status: str,
    outcomes: Sequence[UndeliveredOutcome],
    *,
    final: bool,
    max_length: int | None = None,
) -> str:
    results = [_entry(outcome, max_length) for outcome in outcomes if outcome.code is None]
    errors = [_entry(outcome, max_length) for outcome in outcomes if outcome.code is not None]
    document = {
        "run_id": run_id,
        "status": status,
        "final": final,
        "results": results,
        "errors": errors,
        "counts": {"completed": len(results), "error": len(errors)},
    }
    return json_text(document)


def _entry(outcome: UndeliveredOutcome, max_length: int | None) -> object:
    """Return the outcome's entry. Never raises: what cannot be written is left out."""
    try:
        return json_value((_result if outcome.code is None else _error)(outcome, max_length))
    except Exception as exc:  # noqa: BLE001 - one outcome must not hold back the others
        log.warning("an outcome is delivered in part: %s", type(exc).__name__)
        return json_value({"prompt_id": outcome.id.text, "prompt": None})


def _result(outcome: UndeliveredOutcome, max_length: int | None) -> dict[str, object]:
    url, score = outcome.image_url, _number(outcome.score)
    return {
        "prompt_id": str(outcome.id),
        "record_id": str(outcome.id),  # a result has its prompt's id
        "prompt": _text(outcome.text, max_length),
        "image_url": url,
        **({"image_urls": list(outcome.image_urls)} if outcome.image_urls else {}),
        "gcs_url": gcs_url(url),
        "seed": _number(outcome.seed),
        **({"score": score} if score is not None else {}),
        **({"iterations": outcome.iterations} if outcome.iterations else {}),
    }


def _error(outcome: UndeliveredOutcome, max_length: int | None) -> dict[str, object]:
    return {
        "prompt_id": str(outcome.id),
        "prompt": _text(outcome.text, max_length),
        "error_code": outcome.code,
        "error": _text(outcome.message, max_length),
    }


def _shortened(value: object, max_length: int) -> object:
    """Return the value with every text in it cut to ``max_length``."""
    if isinstance(value, dict):
        return {name: _shortened(each, max_length) for name, each in value.items()}
    if isinstance(value, list):
        return [_shortened(each, max_length) for each in value]
    return _text(value, max_length) if isinstance(value, str) else value


def _number(value: float | None) -> object:
    """Return the number; None if JSON has no form for it."""
    number = json_value(value)
    return number if isinstance(number, int | float) else None


def _text(text: object, max_length: int | None) -> str | None:
    """Return the text, cut to ``max_length``; None for a value that is not a string (of a failed prompt)."""
    if not isinstance(text, str):
        return None
    return text if max_length is None or len(text) <= max_length else f"{text[:max_length]}…"


class Credentials:
    """A signing ``secret`` (``whsec_…``) and a bearer ``token``. Either may be absent.

    Raises ConfigurationError for an invalid one, without showing it.
    """

    def __init__(self, secret: str | None = None, token: str | None = None) -> None:
        self._key = None if secret is None else _key(secret)
        self.token = None if token is None else _check_token(token)

    def headers(self, notification: Notification | None) -> dict[str, str]:
        """Return the headers for a notification, or for a request without a body; without the token."""
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
    """Return the signing key of ``whsec_`` and base64. Checked here: the library skips invalid base64."""
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
        raise ConfigurationError(
            "the callback token contains characters that no header can hold; check --callback-token"
        )
    return token
