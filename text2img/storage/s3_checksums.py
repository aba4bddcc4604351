"""Which of the sums that S3 tells of an object can be made again, and how. Knows no request.

Amazon's guide ("Checking object integrity") says when an ETag is an MD5: never where KMS or the customer's
own keys encrypt. An object that was stored in N parts has the MD5 of its parts' MD5s, and ``-N``; all parts
but the last are taken to be as long as the first, as every uploader makes them.
"""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from text2img.storage.bucket import Sum

_ETAG: Final = re.compile(r'"?([0-9a-f]{32})(?:-(\d+))?"?')


class _Crc32:
    """zlib's CRC-32 in the form of hashlib's sums."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


class _OfParts:
    """The MD5 of the MD5s of parts of ``size`` bytes each, the last one excepted."""

    def __init__(self, size: int) -> None:
        self._size, self._left, self._part, self._done = size, size, _md5(), b""

    def update(self, data: bytes, /) -> None:
        while data:
            piece, data = data[: self._left], data[self._left :]
            self._part.update(piece)
            self._left -= len(piece)
            if not self._left:
                self._close()

    def digest(self) -> bytes:
        if self._left < self._size:
            self._close()
        return hashlib.md5(self._done, usedforsecurity=False).digest()

    def _close(self) -> None:
        self._done += self._part.digest()
        self._left, self._part = self._size, _md5()


def whole(head: Mapping[str, Any], etag: str) -> tuple[Sum, bytes] | None:
    """The sum of the object of that ETag and answer to HEAD, and what it comes to; None where it has none.

    Of an object in parts only what is said to be of the whole: services differ in what else they tell.
    """
    in_parts = "-" in etag
    if head.get("ChecksumType", "COMPOSITE" if in_parts else "FULL_OBJECT") == "FULL_OBJECT":
        for name, kind in (("SHA256", hashlib.sha256), ("SHA1", _sha1), ("CRC32", _Crc32)):
            if told := head.get(f"Checksum{name}"):
                return kind(), base64.b64decode(told)
    md5 = None if in_parts else _md5_in(head, etag)
    return (_md5(), bytes.fromhex(md5[1])) if md5 else None


def of_parts(head: Mapping[str, Any], etag: str, size: int) -> tuple[Sum, bytes] | None:
    """The same of an object in parts, of so many bytes; the answer is about its first part."""
    first, count = int(head.get("ContentLength") or 0), int(head.get("PartsCount") or 0)
    md5 = _md5_in(head, etag)
    if not (md5 and md5[2] and count == int(md5[2]) and (count - 1) * first < size <= count * first):
        return None
    return _OfParts(first), bytes.fromhex(md5[1])


def _md5_in(head: Mapping[str, Any], etag: str) -> re.Match[str] | None:
    """The MD5 in the ETag, and the number of parts, where it is made of MD5s."""
    sealed = "kms" in str(head.get("ServerSideEncryption") or "") or head.get("SSECustomerAlgorithm")
    return None if sealed else _ETAG.fullmatch(etag)


def _md5() -> Any:
    return hashlib.md5(usedforsecurity=False)


def _sha1() -> Any:
    return hashlib.sha1(usedforsecurity=False)
