"""Who tells: the token and the signature of Standard Webhooks 1.0. Knows no URL and sends nothing."""

from __future__ import annotations

import base64
import binascii
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from text2img import __version__
from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from text2img.databases import Notice


class Credentials:
    """``secret`` (``whsec_…``) signs; ``token`` goes as a bearer token. Either may be absent.

    Raises ConfigurationError for one that cannot be used, without showing it.
    """

    def __init__(self, secret: str | None = None, token: str | None = None) -> None:
        self._key = None if secret is None else _key(secret)
        self.token = None if token is None else _check_token(token)

    def headers(self, notice: Notice | None) -> dict[str, str]:
        """The headers for a notice, or for a request without a body; the token is not among them."""
        headers = {"User-Agent": f"text2img/{__version__}"}
        if notice is None:
            return headers
        now = datetime.now(UTC)
        headers["Content-Type"] = "application/json"
        headers["webhook-id"] = notice.id
        headers["webhook-timestamp"] = str(int(now.timestamp()))
        if self._key is not None:
            from standardwebhooks import Webhook

            headers["webhook-signature"] = Webhook(self._key).sign(notice.id, now, notice.body)
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
