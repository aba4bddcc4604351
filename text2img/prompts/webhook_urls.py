"""Where a prompt's own webhooks may go: what ``webhook_url`` says, and which hosts the operator has allowed.

Knows URLs as text: resolves no name and sends nothing.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from text2img.errors import ConfigurationError, ErrorCode, PromptFailed
from text2img.prompts.validation import check_text

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_URL_CHARS: Final = 2_000
FORM: Final = r"^[hH][tT][tT][pP][sS]?://[^\s/?#@\\]+(?:/[^\s?#\\]*)?(?![\s\S])"
"""What every address looks like, as the schema of a file says it: whatever passes may still be none."""
_PLACE: Final = "/api/webhooks/inference"
_URL: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>(?:/[^\x00-\x20\x7f-\U0010ffff?#\\]*)?)",
    re.IGNORECASE | re.ASCII,
)
"""All that is understood: what another parser might read as another host has no place in it."""
_HOST: Final = re.compile(
    r"(?P<wild>\*\.)?(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)(?::(?P<port>[0-9]{1,5}))?",
    re.IGNORECASE | re.ASCII,
)


def check_form(value: object) -> str:
    """A text that looks like a webhook's address; raises PromptFailed (``invalid_parameters``)."""
    text = check_text("webhook_url", value)
    if len(text) > MAX_URL_CHARS or not re.search(FORM, text):
        raise _no_address()
    return text


def _no_address() -> PromptFailed:
    return PromptFailed(
        ErrorCode.INVALID_PARAMETERS,
        "webhook_url must be the backend's http:// or https:// address, without user, query or #",
    )


@dataclass(frozen=True, slots=True)
class Webhook:
    """A checked ``webhook_url``: the backend's ``origin`` (scheme, host, port) and the path before ours."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @classmethod
    def of(cls, value: object) -> Self:
        """What a document's ``webhook_url`` says, with or without our own part of the path.

        Raises PromptFailed (``invalid_parameters``) for all that is no http:// or https:// address, and for
        one with a user, a query or a fragment.
        """
        found = _URL.fullmatch(value) if type(value) is str and len(value) <= MAX_URL_CHARS else None
        host = _host(found["host"]) if found else None
        if not found or not host:
            raise _no_address()
        scheme = found["scheme"].lower()
        port = int(found["port"] or (443 if scheme == "https" else 80))
        if not 0 < port < 65_536:
            raise PromptFailed(ErrorCode.INVALID_PARAMETERS, f"webhook_url: there is no port {port}")
        path = re.sub(rf"{_PLACE}(/(progress|complete|failed))?/*\Z", "", found["path"])
        return cls(scheme, host, port, path.rstrip("/"))

    @property
    def origin(self) -> str:
        """Scheme, host and port, which may be shown; the path may be a secret of its own."""
        usual = self.port == (443 if self.scheme == "https" else 80)
        return f"{self.scheme}://{self.host}" + ("" if usual else f":{self.port}")

    def to(self, word: str) -> str:
        """The URL for ``progress``, ``complete`` or ``failed``."""
        return f"{self.origin}{self.path}{_PLACE}/{word}"

    def __str__(self) -> str:
        return f"{self.origin}{self.path}"


@dataclass(frozen=True, slots=True)
class _Rule:
    """One host, or (``wild``) all names below it; any port, where none is given."""

    host: str
    port: int | None
    wild: bool

    def matches(self, webhook: Webhook) -> bool:
        if self.port not in {None, webhook.port}:
            return False
        return webhook.host.endswith(f".{self.host}") if self.wild else webhook.host == self.host


@dataclass(frozen=True, slots=True)
class HostAllowlist:
    """The hosts that may be told. Without any, none may."""

    rules: tuple[_Rule, ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> Self:
        """The hosts of a list with commas: ``backend.example``, ``10.0.0.5:8000``, ``[::1]``,
        ``*.example.com``. Raises ConfigurationError for what is no host.
        """
        return cls(tuple(_rules(text or "")))

    def check(self, value: object) -> str:
        """The address in its one form, if it may be told; raises PromptFailed (``invalid_parameters``)."""
        webhook = Webhook.of(value)
        if not self.rules:
            raise PromptFailed(
                ErrorCode.INVALID_PARAMETERS,
                "webhook_url is given, but no host may be told; name it in --webhook-host (WEBHOOK_HOST)",
            )
        if not self.allows(webhook):
            raise PromptFailed(
                ErrorCode.INVALID_PARAMETERS,
                f"webhook_url: {webhook.origin[:100]} is no host that --webhook-host (WEBHOOK_HOST) names",
            )
        return str(webhook)

    def allows(self, webhook: Webhook) -> bool:
        """Whether it may be told."""
        return any(rule.matches(webhook) for rule in self.rules)

    def is_exact(self, webhook: Webhook) -> bool:
        """Whether it is named exactly, so that it may have a private address."""
        return any(rule.matches(webhook) for rule in self.rules if not rule.wild)

    @property
    def named(self) -> tuple[tuple[str, int | None], ...]:
        """Host and port of those that are named exactly."""
        return tuple((rule.host, rule.port) for rule in self.rules if not rule.wild)

    def __str__(self) -> str:
        return ", ".join(
            ("*." if rule.wild else "") + rule.host + (f":{rule.port}" if rule.port else "")
            for rule in self.rules
        )


def _rules(text: str) -> Iterator[_Rule]:
    for entry in filter(None, (part.strip() for part in text.split(","))):
        found = _HOST.fullmatch(entry)
        host = _host(found["host"]) if found else None
        port = int(found["port"]) if found and found["port"] else None
        if not found or not host or (found["wild"] and host[0] == "[") or port == 0 or (port or 1) > 65_535:
            raise ConfigurationError(
                f"--webhook-host (WEBHOOK_HOST): {entry[:60]!r} is no host; write backend.example, "
                "backend.example:8000, [::1] or *.example.com, with commas between"
            )
        yield _Rule(host, port, wild=bool(found["wild"]))


def _host(text: str) -> str | None:
    """The host in its one form: lower case, without the last dot, IPv6 as short as it goes; None for none."""
    if not text.startswith("["):
        name = text.lower().removesuffix(".")
        return name if name and ".." not in name and name[0] != "." else None
    try:
        return f"[{ipaddress.IPv6Address(text[1:-1]).compressed}]"
    except ValueError:
        return None
