"""Pictures by a model that somebody else hosts: no device and no weights here, only HTTP.

``engine`` keeps the Engine Protocol, ``errand`` takes one request through the service's queue, ``answers``
says what its answers mean, ``wire`` speaks HTTP, ``files`` reads the pictures. Imports no torch at all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from text2img.errors import ConfigurationError

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
