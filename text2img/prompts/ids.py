"""A prompt's id: any BSON type, known everywhere by a kind and a text, and the file name made from it.

Knows no BSON library: the database adapters turn their values into a PromptId and back.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

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
