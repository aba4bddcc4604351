"""Names that come from outside: ids of prompts, object names made from them, and the URLs of webhooks.

An id can be of any type, and a URL of any form: both are checked before they name or reach anything.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Self
from urllib.parse import quote, unquote

from text2img.errors import ConfigurationError, ErrorCode, PromptFailed
from text2img.prompts.parameters import check_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from text2img.prompts import Request


_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_IN_NAMES = tuple(chr(byte) if byte in _SAFE else f"~{byte:02X}" for byte in range(256))
_LOOKS_TYPED = re.compile(r"[+-]?[0-9]+|[0-9a-fA-F]{24}|")
_LOOKS_CUT = re.compile(r".*~[0-9a-f]{32}", re.DOTALL)
_MAX_NAME_BYTES = 200
_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class PromptId:
    """An id: ``kind`` (``objectid``, ``int``, ``str``, or another BSON type's name) and canonical ``text``.

    ``text`` is the hexadecimal form of an ObjectId, the decimal form of an integer, the string itself,
    and canonical extended JSON for every type without a shorter unambiguous form.
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def name(self) -> str:
        """The id as a file name without extension: at most 200 bytes of ``A–Z a–z 0–9 . _ - ~``.

        Different ids never share a name. Unsafe bytes become ``~XX`` (UTF-8, hexadecimal). A text that could
        be taken for another kind gets a ``~kind`` suffix. A name that is too long is cut and ends in ``~``
        and the first 128 bits of its SHA-256. A name that merely has the form of a cut one is cut as well.
        """
        name = _escape(self.text) + ("" if self._is_unambiguous() else f"~{self.kind}")
        if len(name) < _MAX_NAME_BYTES or (len(name) == _MAX_NAME_BYTES and not _LOOKS_CUT.fullmatch(name)):
            return name
        return f"{name[: _MAX_NAME_BYTES - 33]}~{hashlib.sha256(name.encode()).hexdigest()[:32]}"

    @property
    def seed(self) -> int:
        """A seed in [0, 2³²) that depends only on the id and never changes."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big")

    @property
    def json(self) -> int | float | bool | str | None:
        """The id in its own JSON type; text for a kind that JSON has no type for."""
        if self.kind == "int":
            number = int(self.text)
            return number if number in _INT64 else self.text
        if self.kind == "double":
            return float(self.text) if math.isfinite(float(self.text)) else self.text
        if self.kind == "bool":
            return self.text == "true"
        return None if self.kind == "null" else self.text

    def _is_unambiguous(self) -> bool:
        if self.kind == "str":
            return not _LOOKS_TYPED.fullmatch(self.text)
        return self.kind == "objectid" or (self.kind == "int" and int(self.text) in _INT64)


def _escape(text: str) -> str:
    # surrogatepass: a lone surrogate is not valid UTF-8, but an id that contains one needs a name.
    data = text.encode("utf-8", "surrogatepass")
    name = "".join(map(_IN_NAMES.__getitem__, data))  # in C: an id may have millions of characters
    return f"~2E{name[1:]}" if name.startswith(".") else name


_FIELD: Final = re.compile(r"\{(?:id|generation_id)\}")
_PLAIN: Final = re.compile(r"[A-Za-z0-9._/-]*")
MAX_TEMPLATE_CHARS: Final = 40
"""Maximum characters of a template around its field: with an id's 200 they must fit in a file name."""


@dataclass(frozen=True, slots=True)
class ObjectName:
    """A template for object names: ``before`` and ``after`` surround the id's name."""

    TEMPLATE: ClassVar = "{id}"

    before: str = ""
    after: str = ""

    @classmethod
    def parse(cls, template: str) -> ObjectName:
        """Parse a template with one ``{id}`` or ``{generation_id}`` (synonyms); raise ValueError if invalid.

        Around the field there are at most MAX_TEMPLATE_CHARS of ``A–Z a–z 0–9 . _ - /``. No part between
        slashes is empty, starts with a dot or contains two dots in a row, so that no object leaves its folder
        or is hidden in it.
        """
        around = _FIELD.split(template)
        if len(around) != 2:
            raise ValueError("it must contain {id} or {generation_id}, once")
        if not all(_PLAIN.fullmatch(text) for text in around):
            raise ValueError("around {id} it must contain only A–Z a–z 0–9 . _ - /")
        if sum(map(len, around)) > MAX_TEMPLATE_CHARS:
            raise ValueError(f"around {{id}} it must not be longer than {MAX_TEMPLATE_CHARS} characters")
        parts = "id".join(around).split("/")
        if any(not part or part.startswith(".") or ".." in part for part in parts):
            raise ValueError("no part of it may be empty, start with a dot, or contain two dots in a row")
        return cls(*around)

    def name_of(self, request: Request) -> str:
        """Return the name of the requested image."""
        return self.of(request.prompt.id, request.number)

    def of(self, prompt_id: PromptId, number: int = 0) -> str:
        """Return the name of the prompt's image of that number, from 0; the first has no number in it.

        No two images share a name. Each digit follows its own tilde: ``~1``, … ``~9``, ``~1~0``. No id's name
        ends in a tilde and a digit: the tilde of an escape is followed by two characters of ``0–9 A–F``, that
        of a suffix by a kind's name, and that of a hash by 32 characters.
        """
        digits = "".join(f"~{digit}" for digit in str(number)) if number else ""
        return f"{self.before}{prompt_id.name}{self.after}{digits}"


@dataclass(frozen=True, slots=True)
class IterationFolderName:
    """Object names with a folder for each prompt and a name per iteration: ``results/<id>/iteration_2``."""

    def folder(self, prompt_id: PromptId) -> str:
        """Return the prompt's folder."""
        return f"results/{prompt_id.name}"

    def name_of(self, request: Request) -> str:
        """Return the name of the requested image; in an iteration, all but the first are numbered from 2."""
        suffix = f"_image_{request.candidate + 1}" if request.candidate else ""
        return f"{self.folder(request.prompt.id)}/iteration_{request.iteration}{suffix}"


_GCS_SCHEME = "gs://"
_PUBLIC_GCS_URL = "https://storage.googleapis.com/"


def quoted(path: str) -> str:
    """Return an object's name quoted for an ``https://`` URL (RFC 3986): UTF-8, slashes unchanged."""
    return quote(path, safe="/~")


def public_gcs_url(bucket: str, path: str) -> str:
    """Return the ``https://`` URL of a Cloud Storage object; it works if the object may be read publicly."""
    return f"{_PUBLIC_GCS_URL}{bucket}/{quoted(path)}"


def gcs_url(image_url: str | None) -> str | None:
    """Return the ``gs://`` URL of an image on Cloud Storage, also from its public URL; None for others."""
    url = image_url or ""
    if url.startswith(_PUBLIC_GCS_URL):
        return _GCS_SCHEME + unquote(url.removeprefix(_PUBLIC_GCS_URL))
    return url if url.startswith(_GCS_SCHEME) else None


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
