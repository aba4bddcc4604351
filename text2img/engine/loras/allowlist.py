"""Where LoRAs may come from: what the operator allows by --lora-source, and what a document's path means.

A path is hostile until it is checked here: it is taken apart, what could be read in two ways is refused, and
the parts are compared one by one. Fetches nothing; looks at no file but to see where symbolic links lead.

| a document writes | which is |
|---|---|
| ``/folder/file.safetensors`` | a file of this machine |
| ``owner/name``, ``owner/name/file.safetensors`` | of the hub |
| ``gs://bucket/key``, ``s3://bucket/key`` | an object |
| ``https://host/path`` | a file of a web server |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from text2img.errors import ConfigurationError, ErrorCode, PromptFailed

ENDING: Final = ".safetensors"
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_HUB_FILE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._+()-]{0,199}")
_BUCKET: Final = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
_HOST: Final = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:]+\]")
_ODD: Final = re.compile(r"[\x00-\x20\x7f\\]|[^\x00-\x7f]")
"""What no URL holds as it stands: controls, blanks, backslashes (slashes to some), other scripts."""
_LOOPBACK: Final = ("127.0.0.1", "localhost", "[::1]")
_PORTS: Final = {"https": 443, "http": 80}


class _UnreadableError(ValueError):
    """A path that means nothing, or could mean two things; says why."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a LoRA is, or a prefix of such. ``kind``: file, hub, gs, s3, https or http; ``root``: the bucket,
    or ``host:port``; ``parts``: what stands between slashes; ``query`` of a URL, with its question mark.
    """

    kind: str
    root: str
    parts: tuple[str, ...]
    query: str = ""

    def holds(self, other: Place) -> bool:
        """Whether the other is this one or lies below it."""
        below = other.parts[: len(self.parts)] == self.parts
        return (self.kind, self.root) == (other.kind, other.root) and below

    @property
    def path(self) -> str:
        """The parts, with slashes between."""
        return "/".join(self.parts)


class Sources:
    """The prefixes that the operator allows; none, and no LoRA is fetched."""

    def __init__(self, allowed: tuple[Place, ...] = ()) -> None:
        self._allowed = allowed

    @classmethod
    def parse(cls, text: str | None) -> Sources:
        """Of prefixes with commas between: folders, ``hub:``, ``hub:owner/``, ``gs://…``, ``s3://…``,
        ``https://…``, and ``http://`` on loopback. Raises ConfigurationError for what is none of them.
        """
        prefixes = [part.strip() for part in (text or "").split(",") if part.strip()]
        try:
            return cls(tuple(_prefix(each) for each in prefixes))
        except _UnreadableError as exc:
            raise ConfigurationError(f"--lora-source (LORA_SOURCE): {exc}") from None

    def __bool__(self) -> bool:
        return bool(self._allowed)

    def check(self, path: str) -> Place:
        """Where the path leads. Raises PromptFailed (``lora_failed``) where that is not allowed."""
        try:
            place = _place(path)
        except _UnreadableError as exc:
            raise PromptFailed(ErrorCode.LORA_FAILED, f"the path of the LoRA cannot be used: {exc}") from None
        if place.kind == "file":
            place = _resolved(place)
        if not any(allowed.holds(place) for allowed in self._allowed):
            raise PromptFailed(
                ErrorCode.LORA_FAILED,
                "this LoRA is not from a source that the operator of this job allows; sources are allowed by"
                " --lora-source (LORA_SOURCE)",
            )
        return place


def _prefix(text: str) -> Place:
    """What the operator writes: as documents do, but for folders of any spelling, and ``hub:``."""
    if text.startswith("hub:"):
        parts = tuple(text.removeprefix("hub:").strip("/").split("/"))
        parts = () if parts == ("",) else parts
        if len(parts) > 2 or not all(_HUB_NAME.fullmatch(part) for part in parts):
            raise _UnreadableError(f"{text} should be hub:, hub:OWNER/ or hub:OWNER/NAME")
        return Place("hub", "", parts)
    if "://" in text:
        return _url(text, prefix=True)
    if not text.startswith(("/", ".", "~")):
        raise _UnreadableError(f"{text} should be a folder (/… or ./…), hub:…, gs://…, s3://… or https://…")
    return Place("file", "", Path(text).expanduser().resolve().parts)


def _place(path: str) -> Place:
    if "://" in path:
        return _url(path, prefix=False)
    if path.startswith("/"):
        if not path.endswith(ENDING):
            raise _UnreadableError(f"a file's name must end in {ENDING}")
        return Place("file", "", Path(path).parts)
    owner_name, files = path.split("/")[:2], path.split("/")[2:]
    named = len(owner_name) == 2 and all(_HUB_NAME.fullmatch(part) for part in owner_name)
    if not named or not all(_HUB_FILE.fullmatch(part) for part in files):
        raise _UnreadableError("write /FOLDER/FILE, OWNER/NAME of the hub, gs://…, s3://… or https://…")
    if files and not files[-1].endswith(ENDING):
        raise _UnreadableError(f"a file's name must end in {ENDING}")
    return Place("hub", "", (*owner_name, *files))


def _url(text: str, *, prefix: bool) -> Place:
    if _ODD.search(text):
        raise _UnreadableError("a URL must not hold blanks, backslashes, or characters that are not ASCII")
    scheme, _, rest = text.partition("://")
    kind = scheme.lower()
    if kind in {"gs", "s3"}:
        bucket, _, key = rest.partition("/")
        if not _BUCKET.fullmatch(bucket) or re.search(r"[?#]", key):
            raise _UnreadableError(f"write {kind}://BUCKET/KEY")
        return Place(kind, bucket, _parts(key, prefix=prefix))
    if kind not in _PORTS:
        raise _UnreadableError(f"{kind[:20]}:// is not read; use gs://, s3:// or https://")
    return _web(text, kind, prefix=prefix)


def _web(text: str, kind: str, *, prefix: bool) -> Place:
    try:
        split = urlsplit(text)
        host, port = split.netloc.lower(), split.port or _PORTS[kind]
    except ValueError:
        raise _UnreadableError("it is no URL") from None
    if "@" in host:
        raise _UnreadableError("a URL must not hold a user or a password")
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
    if not _HOST.fullmatch(name) or ".." in name or split.fragment:
        raise _UnreadableError(f"write {kind}://HOST/PATH")
    if kind == "http" and name not in _LOOPBACK:
        raise _UnreadableError("http:// is not read but on this machine itself; use https://")
    query = f"?{split.query}" if split.query else ""
    if prefix and query:
        raise _UnreadableError("a source is a prefix, without a question mark")
    return Place(kind, f"{name}:{port}", _parts(split.path.removeprefix("/"), prefix=prefix), query)


def _parts(path: str, *, prefix: bool) -> tuple[str, ...]:
    """What stands between the slashes, as it is written; nothing that a server could take for another."""
    parts = tuple(path.split("/"))
    if prefix and parts[-1] == "":  # the slash that ends a prefix, or no path at all
        parts = parts[:-1]
    for part in parts:
        plain = _unquoted(part)
        if plain.strip() in {"", ".", ".."} or re.search(r"[/\\\x00-\x1f\x7f]", plain):
            raise _UnreadableError("its path has an empty part, dots alone, or a hidden slash")
    return parts


def _unquoted(part: str) -> str:
    """The part with its percent signs read, however often they were written over one another."""
    while (plain := unquote(part)) != part:
        part = plain
    return part


def _resolved(place: Place) -> Place:
    """Where the file is once all symbolic links are followed."""
    try:
        return Place("file", "", Path(*place.parts).resolve().parts)
    except (OSError, RuntimeError, ValueError):
        raise PromptFailed(ErrorCode.LORA_FAILED, "the path of the LoRA cannot be followed") from None
