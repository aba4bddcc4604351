"""What a prompt's document records of its images, for every adapter: their hashes, and a loop's tries.

Hashes are never removed: a worker replaces an existing image only if its hash is one of them.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

from text2img.prompts import Evaluation, StoredImage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

HASH_FIELDS: Final = ("sha256", "sha256s")
"""The SHA-256 of the first image, and of all images recorded for a prompt, where there are several."""
_MAX_USED: Final = 100
"""The most entries in the parameters that a try records, and in a list or object among them."""
_MAX_INTEGER: Final = 2**64
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


def documents_of(tries: Sequence[StoredImage], best: StoredImage | None) -> list[dict[str, object]]:
    """Return the documents of the tries, in order; the ``best`` one, once known, is marked."""
    return [_document_of(image, best=image is best) for image in tries]


def tries_of(value: object) -> tuple[StoredImage, ...]:
    """Return the tries in a prompt's document with which its loop continues.

    Empty if the loop has ended (a best try is marked): the owner then wants the prompt generated again. Also
    empty if any try is malformed: another program may have changed it.
    """
    if not isinstance(value, list):
        return ()
    try:
        return () if any("best" in entry for entry in value) else tuple(_try_of(entry) for entry in value)
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


def _document_of(image: StoredImage, *, best: bool) -> dict[str, object]:
    document: dict[str, object] = {
        "iteration": image.iteration,
        "number": image.number,
        "prompt": image.text,
        "seed": image.used.get("seed"),
        "image_url": image.image_url,
        "sha256": image.sha256,
        "truncated": image.truncated,
        "used": dict(image.used),
    }
    if image.evaluation is not None:
        document |= {"score": image.score, "evaluation": image.evaluation.document}
    return document | ({"best": True} if best else {})


def _try_of(document: dict[str, Any]) -> StoredImage:
    texts = {"text": document["prompt"], "image_url": document["image_url"], "sha256": document["sha256"]}
    counts = {name: document[name] for name in ("iteration", "number")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise TypeError("not a text")
    if not all(type(count) is int and 0 <= count < 1_000_000 for count in counts.values()):
        raise TypeError("not a count")
    evaluation = document.get("evaluation")
    return StoredImage(
        **texts,
        **counts,
        used=_plain(document["used"]),
        truncated=document["truncated"] is True,
        evaluation=None if evaluation is None else Evaluation.of(evaluation),
    )


def _plain(used: Mapping[object, object]) -> dict[str, object]:
    """Return the recorded parameters; raise TypeError for a value that this job does not record."""
    if len(used) > _MAX_USED or not all(isinstance(name, str) for name in used):
        raise TypeError("not parameters")
    if not all(_is_plain(value) for value in used.values()):
        raise TypeError("not a parameter")
    return {str(name): value for name, value in used.items()}


def _is_plain(value: object, depth: int = 0) -> bool:
    """Return True for a value of JSON: a text, a number, a truth value, null, or a few of them."""
    if isinstance(value, list | tuple | dict):
        inner = value.values() if isinstance(value, dict) else value
        keys = all(isinstance(key, str) for key in value) if isinstance(value, dict) else True
        return depth < 3 and len(value) <= _MAX_USED and keys and all(_is_plain(v, depth + 1) for v in inner)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, int):
        return abs(value) < _MAX_INTEGER
    return value is None or type(value) is str
