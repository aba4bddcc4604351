"""A LoRA from a bucket of Cloud Storage or S3, part by part, by the clients that the storage has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from text2img.errors import ErrorCode, PromptFailed
from text2img.storage import StorageOptions, open_bucket
from text2img.storage.bucket import Refused

if TYPE_CHECKING:
    from text2img.engine.loras.allowlist import Place
    from text2img.engine.loras.cache import Sink

_PART: Final = 8 * 2**20
_PATIENCE: Final = 2.0
"""Seconds for one request's own tries; whoever fetches tries again."""


def fetch(place: Place, known: str | None, sink: Sink, s3_endpoint: str | None) -> str | None:
    """As ``web.fetch``; the version is the object's generation or ETag."""
    try:
        bucket = open_bucket(place.kind, place.root, StorageOptions(s3_endpoint=s3_endpoint), _PATIENCE)
        found = bucket.look(place.path)
        if known and known == found.version:
            return None
        sink.expect(found.size)
        for start in range(0, found.size or 0, _PART):
            end = min(start + _PART, found.size or 0)
            sink.write(bucket.read(place.path, found.version, start, end))
    except Refused as exc:
        raise PromptFailed(
            ErrorCode.LORA_FAILED, f"the LoRA cannot be fetched: its bucket answers {_meaning(exc)}"
        ) from exc
    return found.version or ""


def _meaning(exc: Refused) -> str:
    words = {
        404: "that it is not there",
        403: "that this account may not read it",
        412: "that it has changed",
    }
    return words.get(exc.status, str(exc))
