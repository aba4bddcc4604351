"""The records that a database accepts and returns, besides prompts, claims and outcomes."""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from text2img.prompts import Evaluation, StoredImage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from text2img.prompts import PromptId, RequestedParameters


@dataclass(frozen=True, slots=True)
class Collections:
    """The names of the collections (or tables)."""

    datasets: str = "datasets"
    model_configs: str = "model_configs"
    dataset_records: str = "dataset_records"
    runs: str = "runs"
    callbacks: str = "callbacks"


@dataclass(frozen=True, slots=True)
class Selection:
    """The prompts that a run processes: all, or those of one data set.

    ``dataset_id`` matches as text, and as an ObjectId or a number if it has that form. The prompts of
    ``exclude`` are left out.
    """

    dataset_id: str | None = None
    exclude: frozenset[PromptId] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPrompt:
    """A prompt to add, already validated."""

    id: PromptId
    text: str
    requested: RequestedParameters
    dataset_id: str | int | None = None
    priority: float | None = None
    webhook_url: str | None = None
    style_id: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredPrompt:
    """The state of what is stored under the id of a new prompt.

    ``removed``: it has left its input file. ``differs``: its content is another. ``held``: a worker has a
    live claim on it. ``waiting``: it is claimable, and in the selection.
    """

    removed: bool
    differs: bool
    held: bool
    waiting: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The number of prompts by status.

    Leases are those of prompts in processing. ``undelivered`` counts final outcomes that are in no
    notification yet, ``pending_webhooks`` those in none for the prompt's own webhook. ``images`` counts the
    images of completed prompts, ``errors`` failed prompts by error code, ``removed`` prompts that have left
    their input file, ``other`` those of each status that is not this job's, quoted, the most frequent first.
    """

    pending: int
    processing: int
    completed: int
    error: int
    live_leases: int
    expired_leases: int
    oldest_pending: datetime | None
    undelivered: int
    pending_webhooks: int = 0
    images: int = 0
    removed: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)
    other: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerClaims:
    """One worker's claims: the number of ``prompts`` in processing under its name.

    ``expired`` counts those whose lease has expired; ``lease_until`` is when the last lease ends.
    """

    worker: str
    prompts: int
    expired: int
    lease_until: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of the job.

    ``completed``, ``failed`` and ``postponed`` count prompts, ``images`` the recorded images.
    ``images_per_second`` is measured from the first batch's start to the last record;
    ``steady_images_per_second`` excludes the first batch. ``device_busy`` (in [0, 1]) is the device's share
    of the time from the first batch to the last, ``device_busy_of_run`` of the whole run. ``seconds`` are by
    stage; ``peak_memory`` is in bytes. ``gpu_hour_price`` is the hourly price of the run's hardware in
    dollars, if configured.
    ``worker`` is the name under which it claims.
    ``task_index`` and ``execution`` come from the platform if the run is one task of a job.
    ``alive_until`` is the end of a running run's lease: once it has passed, the run's process is dead.
    ``seen_at`` is when the run last renewed that lease.
    ``tries`` counts the processes that have worked under the id, one after the other; all figures but
    ``started_at`` are those of the last one, which began at ``resumed_at`` if it is not the first.
    """

    id: str
    started_at: datetime
    host: str
    task_index: int | None = None
    execution: str | None = None
    status: str = "running"
    finished_at: datetime | None = None
    model: str | None = None
    completed: int = 0
    failed: int = 0
    images: int = 0
    postponed: int = 0
    images_per_second: float = 0.0
    steady_images_per_second: float = 0.0
    device_busy: float = 0.0
    device_busy_of_run: float = 0.0
    peak_memory: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    gpu_hour_price: float | None = None
    worker: str | None = None
    tries: int = 1
    resumed_at: datetime | None = None
    alive_until: datetime | None = field(default=None, compare=False)
    seen_at: datetime | None = field(default=None, compare=False)

    @property
    def work_started_at(self) -> datetime:
        """The time at which the last process began to work under the run's id."""
        return self.resumed_at or self.started_at

    @property
    def dollars_per_1000_images(self) -> float | None:
        """The cost of 1,000 images: the whole duration, loading included, at the hourly price, per image.

        None without a price, without images, or before the run's end.
        """
        if self.gpu_hour_price is None or self.finished_at is None or not self.images:
            return None
        seconds = (self.finished_at - self.work_started_at).total_seconds()
        return seconds * self.gpu_hour_price / 3600 / self.images * 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletedPrompt:
    """A completed prompt, as stored.

    ``dataset_id`` and ``run_id`` are text. ``image_urls`` are all of its images in order, and ``scores``
    are theirs (None: unscored). ``used`` are its parameters. For a prompt with a refinement loop,
    ``iterations`` is the number used, and ``tries`` holds each candidate as recorded. ``hashes`` are the
    SHA-256 of all images that were recorded for it.
    """

    id: PromptId
    text: str
    dataset_id: str | None
    run_id: str | None
    image_urls: tuple[str, ...]
    completed_at: datetime | None
    used: Mapping[str, object]
    scores: tuple[float | None, ...] = ()
    evaluation: Mapping[str, object] = field(default_factory=dict)
    iterations: int | None = None
    tries: tuple[Mapping[str, object], ...] = ()
    hashes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A prompt that failed permanently: ``code`` as stored, ``message`` for its owner."""

    id: PromptId
    text: str
    dataset_id: str | None
    run_id: str | None
    code: str
    message: str
    attempts: int
    failed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTotals:
    """A run's totals: completed prompts, failed prompts, and the images of the completed ones."""

    completed: int
    failed: int
    images: int


_FIXED_SIZE = 200
"""Bytes of an outcome in a notification besides its texts and URLs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UndeliveredOutcome:
    """A final outcome, completed or failed, that is still to be delivered.

    ``image_urls`` are those of a prompt with several images, ``score`` is the evaluator's score of the first.
    ``iterations`` counts those of its loop; ``attempts`` counts the prompt's failures, including this one.
    """

    id: PromptId
    text: object
    image_url: str | None = None
    image_urls: tuple[str, ...] = ()
    seed: int | None = None
    score: float | None = None
    iterations: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    code: str | None = None
    message: str | None = None
    attempts: int = 0

    @property
    def size(self) -> int:
        """The approximate number of bytes of the outcome in a notification."""
        texts = (self.text, self.message, self.image_url, self.image_url, *self.image_urls)
        return _FIXED_SIZE + sum(len(json.dumps(text)) for text in texts if isinstance(text, str))


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingWebhook:
    """A final outcome to deliver to the prompt's own webhook, always under the same notification id.

    ``webhook_url`` is the value that the prompt has now.
    """

    notification_id: str
    run_id: str
    webhook_url: object
    outcome: UndeliveredOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """The content of one POST. ``id`` is the webhook id; ``body`` (JSON) never changes.

    ``url`` is a prompt's own webhook, and ``origin`` its scheme, host and port. Both are None for the
    callback's receiver.
    """

    id: str
    run_id: str
    body: str
    tries: int = 0
    url: str | None = None
    origin: str | None = None


def webhook_id() -> str:
    """Return a new id: ``msg_``, the time in nanoseconds and 64 random bits. Ids sort by their age.

    It stays the same over all delivery attempts of a notification, so that receivers recognise it.
    """
    return f"msg_{time.time_ns():016x}{secrets.token_hex(8)}"


def is_webhook_id(value: object) -> TypeGuard[str]:
    """Return True if the value has the form of an id from ``webhook_id``: another program may have set it."""
    return isinstance(value, str) and re.fullmatch(r"msg_[0-9a-f]{32}", value) is not None


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
