"""The hashes of a prompt's images in its document, for every adapter.

They are never removed: a worker replaces an existing image only if its hash is one of them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

HASH_FIELDS: Final = ("sha256", "sha256s")
"""The SHA-256 of the first image, and of all images recorded for a prompt, where there are several."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_HASHES: Final = 1_000
"""The hashes that are kept of one prompt, the latest ones: 100 images and ten generations of them."""


def recorded_hashes(fields: Mapping[str, object]) -> tuple[str, ...]:
    """Return the hashes of all images that a prompt's document records, without malformed ones."""
    tries = fields.get("tries")
    entries = tries[-_MAX_HASHES:] if isinstance(tries, list) else []
    several = fields.get("sha256s")
    hashes = [
        *(several[-_MAX_HASHES:] if isinstance(several, list) else []),
        *(entry.get("sha256") for entry in entries if isinstance(entry, dict)),
        fields.get("sha256"),
    ]
    return merged_hashes(each for each in hashes if isinstance(each, str) and _SHA256.fullmatch(each))


def merged_hashes(hashes: Iterable[str]) -> tuple[str, ...]:
    """Return the hashes without repetitions; of too many the latest."""
    return tuple(dict.fromkeys(hashes))[-_MAX_HASHES:]
