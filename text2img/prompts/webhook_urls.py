"""Validation of ``webhook_url``: its form, and the hosts that the operator allows.

URLs are handled as text: no name is resolved and nothing is sent.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from text2img.errors import ConfigurationError, ErrorCode, PromptFailed
from text2img.prompts.parameters import check_text

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_URL_CHARS: Final = 2_000
URL_PATTERN: Final = r"^[hH][tT][tT][pP][sS]?://[^\s/?#@\\]+(?:/[^\s?#\\]*)?(?![\s\S])"
"""The pattern of a URL for the JSON schema of prompt files; a text that matches may still be invalid."""
_PATH: Final = "/api/webhooks/inference"
_URL: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>(?:/[^\x00-\x20\x7f-\U0010ffff?#\\]*)?)",
    re.IGNORECASE | re.ASCII,
)
"""All accepted URLs: it excludes forms in which another parser might read another host."""
_HOST: Final = re.compile(
    r"(?P<wild>\*\.)?(?P<host>\[[0-9a-f:.]+\]|[a-z0-9_-]+(?:\.[a-z0-9_-]+)*)(?::(?P<port>[0-9]{1,5}))?",
    re.IGNORECASE | re.ASCII,
)


def check_form(value: object) -> str:
    """Return a text that matches URL_PATTERN; raise PromptFailed (``invalid_parameters``) for others."""
    text = check_text("webhook_url", value)
    if len(text) > MAX_URL_CHARS or not re.search(URL_PATTERN, text):
        raise _invalid_url()
    return text


def _invalid_url() -> PromptFailed:
    return PromptFailed(
        ErrorCode.INVALID_PARAMETERS,
        "webhook_url must be the backend's http:// or https:// address, without user, query or #",
    )


@dataclass(frozen=True, slots=True)
class Webhook:
    """A valid ``webhook_url``: the backend's ``origin`` (scheme, host, port) and the path before ours."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @classmethod
    def of(cls, value: object) -> Self:
        """Parse a document's ``webhook_url``, with or without our own part of the path.

        Raises PromptFailed (``invalid_parameters``) for anything but an http:// or https:// URL, and for one
        with a user, a query or a fragment.
        """
        found = _URL.fullmatch(value) if type(value) is str and len(value) <= MAX_URL_CHARS else None
        host = _host(found["host"]) if found else None
        if not found or not host:
            raise _invalid_url()
        scheme = found["scheme"].lower()
        port = int(found["port"] or (443 if scheme == "https" else 80))
        if not 0 < port < 65_536:
            raise PromptFailed(ErrorCode.INVALID_PARAMETERS, f"webhook_url: invalid port {port}")
        path = re.sub(rf"{_PATH}(/(progress|complete|failed))?/*\Z", "", found["path"])
        return cls(scheme, host, port, path.rstrip("/"))

    @property
    def origin(self) -> str:
        """Scheme, host and port, which may be logged; the path may contain a secret."""
        is_default = self.port == (443 if self.scheme == "https" else 80)
        return f"{self.scheme}://{self.host}" + ("" if is_default else f":{self.port}")

    def to(self, event: str) -> str:
        """Return the URL for ``progress``, ``complete`` or ``failed``."""
        return f"{self.origin}{self.path}{_PATH}/{event}"

    def __str__(self) -> str:
        return f"{self.origin}{self.path}"


@dataclass(frozen=True, slots=True)
class _Rule:
    """One host, or with ``wildcard`` all its subdomains; any port if ``port`` is None."""

    host: str
    port: int | None
    wildcard: bool

    def matches(self, webhook: Webhook) -> bool:
        if self.port not in {None, webhook.port}:
            return False
        return webhook.host.endswith(f".{self.host}") if self.wildcard else webhook.host == self.host


@dataclass(frozen=True, slots=True)
class HostAllowlist:
    """The hosts that webhooks may be sent to; empty allows none."""

    rules: tuple[_Rule, ...] = ()

    @classmethod
    def parse(cls, text: str | None) -> Self:
        """Parse a comma-separated list of hosts; raise ConfigurationError for an invalid one.

        Examples: ``backend.example``, ``10.0.0.5:8000``, ``[::1]``, ``*.example.com``.
        """
        return cls(tuple(_rules(text or "")))

    def check(self, value: object) -> str:
        """Return the normalised URL if its host is allowed; raise PromptFailed (``invalid_parameters``)."""
        webhook = Webhook.of(value)
        if not self.rules:
            raise PromptFailed(
                ErrorCode.INVALID_PARAMETERS,
                "webhook_url is given, but no host is allowed; name it in --webhook-host (WEBHOOK_HOST)",
            )
        if not self.allows(webhook):
            raise PromptFailed(
                ErrorCode.INVALID_PARAMETERS,
                f"webhook_url: {webhook.origin[:100]} is not allowed by --webhook-host (WEBHOOK_HOST)",
            )
        return str(webhook)

    def allows(self, webhook: Webhook) -> bool:
        """Return True if a rule matches the webhook's host and port."""
        return any(rule.matches(webhook) for rule in self.rules)

    def is_exact(self, webhook: Webhook) -> bool:
        """Return True if a rule names the host exactly; it may then have a private address."""
        return any(rule.matches(webhook) for rule in self.rules if not rule.wildcard)

    @property
    def exact_hosts(self) -> tuple[tuple[str, int | None], ...]:
        """Host and port of the rules that name a host exactly."""
        return tuple((rule.host, rule.port) for rule in self.rules if not rule.wildcard)

    def __str__(self) -> str:
        return ", ".join(
            ("*." if rule.wildcard else "") + rule.host + (f":{rule.port}" if rule.port else "")
            for rule in self.rules
        )


def _rules(text: str) -> Iterator[_Rule]:
    for entry in filter(None, (part.strip() for part in text.split(","))):
        found = _HOST.fullmatch(entry)
        host = _host(found["host"]) if found else None
        port = int(found["port"]) if found and found["port"] else None
        if not found or not host or (found["wild"] and host[0] == "[") or port == 0 or (port or 1) > 65_535:
            raise ConfigurationError(
                f"--webhook-host (WEBHOOK_HOST): {entry[:60]!r} is not a host; write backend.example, "
                "backend.example:8000, [::1] or *.example.com, separated by commas"
            )
        yield _Rule(host, port, wildcard=bool(found["wild"]))


def _host(text: str) -> str | None:
    """Return the normalised host: lower case, no final dot, shortest IPv6 form; None if it is invalid."""
    if not text.startswith("["):
        name = text.lower().removesuffix(".")
        return name if name and ".." not in name and name[0] != "." else None
    try:
        return f"[{ipaddress.IPv6Address(text[1:-1]).compressed}]"
    except ValueError:
        return None
