"""Prompt ids, and the object names and URLs that are made of them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from text2img.prompts import Request


_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_LOOKS_TYPED = re.compile(r"[+-]?[0-9]+|[0-9a-fA-F]{24}|")
_LOOKS_CUT = re.compile(r".*~[0-9a-f]{32}", re.DOTALL)
_LONGEST = 200
_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class PromptId:
    """An id as ``kind`` (``objectid``, ``int``, ``str``, or another BSON type's name) and canonical ``text``.

    ``text`` is the hexadecimal form of an ObjectId, the decimal form of an integer, the string itself,
    and canonical extended JSON for every type without a shorter unambiguous form.
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def name(self) -> str:
        """The id as a file name without its ending: at most 200 bytes of ``A–Z a–z 0–9 . _ - ~``.

        Two different ids never share a name: what is not safe becomes ``~XX`` (UTF-8, hexadecimal), what
        could be taken for another kind carries a ``~kind`` mark, and what is too long is cut and ends in
        ``~`` and the first 128 bits of its SHA-256. A name that merely looks cut is cut as well.
        """
        name = _escape(self.text) + ("" if self._stands_as_it_is() else f"~{self.kind}")
        if len(name) < _LONGEST or (len(name) == _LONGEST and not _LOOKS_CUT.fullmatch(name)):
            return name
        return f"{name[: _LONGEST - 33]}~{hashlib.sha256(name.encode()).hexdigest()[:32]}"

    @property
    def seed(self) -> int:
        """A seed in [0, 2³²) that depends on the id alone and stays the same for ever."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:4], "big")

    def _stands_as_it_is(self) -> bool:
        if self.kind == "str":
            return not _LOOKS_TYPED.fullmatch(self.text)
        return self.kind == "objectid" or (self.kind == "int" and int(self.text) in _INT64)


def _escape(text: str) -> str:
    # surrogatepass: a lone surrogate cannot be written as UTF-8, yet an id that holds one needs a name.
    data = text.encode("utf-8", "surrogatepass")
    name = "".join(chr(byte) if byte in _SAFE else f"~{byte:02X}" for byte in data)
    return f"~2E{name[1:]}" if name.startswith(".") else name


_FIELD: Final = re.compile(r"\{(?:id|generation_id)\}")
_PLAIN: Final = re.compile(r"[A-Za-z0-9._/-]*")
LONGEST_AROUND: Final = 40
"""Characters of a template besides its field: with an id's 200 they must make a file's name."""


@dataclass(frozen=True, slots=True)
class ObjectName:
    """``before`` and ``after`` stand around the id's name."""

    TEMPLATE: ClassVar = "{id}"

    before: str = ""
    after: str = ""

    @classmethod
    def parse(cls, template: str) -> ObjectName:
        """A template with ``{id}`` or ``{generation_id}`` (the same) once; ValueError says what is wrong.

        Around it stand at most LONGEST_AROUND of ``A–Z a–z 0–9 . _ - /``; no part between slashes is empty,
        starts with a dot or holds two in a row, so that no name leaves its folder or hides there.
        """
        around = _FIELD.split(template)
        if len(around) != 2:
            raise ValueError("it must hold {id} or {generation_id}, once")
        if not all(_PLAIN.fullmatch(text) for text in around):
            raise ValueError("around {id} it must hold nothing but A–Z a–z 0–9 . _ - /")
        if sum(map(len, around)) > LONGEST_AROUND:
            raise ValueError(f"around {{id}} it must not be longer than {LONGEST_AROUND} characters")
        parts = "id".join(around).split("/")
        if any(not part or part.startswith(".") or ".." in part for part in parts):
            raise ValueError("no part of it may be empty, start with a dot, or hold two dots in a row")
        return cls(*around)

    def name_of(self, request: Request) -> str:
        """The name of the picture that is asked for."""
        return self.of(request.prompt.id, request.number)

    def of(self, prompt_id: PromptId, number: int = 0) -> str:
        """The name of the prompt's picture of that number, from 0; the first has no number in it.

        No two pictures share one. Each digit follows a tilde of its own: ``~1``, … ``~9``, ``~1~0``. No id's
        name ends in a tilde and a digit: one that begins an escape is followed by two characters of
        ``0–9 A–F``, one that begins a mark by a kind's name, one that begins a hash by 32 characters.
        """
        digits = "".join(f"~{digit}" for digit in str(number)) if number else ""
        return f"{self.before}{prompt_id.name}{self.after}{digits}"


@dataclass(frozen=True, slots=True)
class IterationFolderName:
    """A folder for each prompt, in it the pictures of each iteration: ``results/<id>/iteration_2``."""

    def folder(self, prompt_id: PromptId) -> str:
        """The prompt's folder."""
        return f"results/{prompt_id.name}"

    def name_of(self, request: Request) -> str:
        """The name of the picture that is asked for; of several in one iteration all but the first are
        numbered, from 2 on.
        """
        nth = f"_image_{request.candidate + 1}" if request.candidate else ""
        return f"{self.folder(request.prompt.id)}/iteration_{request.iteration}{nth}"


_ON_GCS = "gs://"
_PUBLIC_ON_GCS = "https://storage.googleapis.com/"


def quoted(path: str) -> str:
    """An object's name as it stands in an ``https://`` URL (RFC 3986): UTF-8, slashes as they are."""
    return quote(path, safe="/~")


def public_gcs_url(bucket: str, path: str) -> str:
    """Where anybody finds an object of Cloud Storage, provided that they may read it."""
    return f"{_PUBLIC_ON_GCS}{bucket}/{quoted(path)}"


def gcs_url(image_url: str | None) -> str | None:
    """The ``gs://`` URL of a picture on Cloud Storage, also from its public one; None for any other."""
    url = image_url or ""
    if url.startswith(_PUBLIC_ON_GCS):
        return _ON_GCS + unquote(url.removeprefix(_PUBLIC_ON_GCS))
    return url if url.startswith(_ON_GCS) else None
