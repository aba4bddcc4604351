"""What goes in and out of a database besides prompts, claims and outcomes."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from text2img.prompts import PromptId, RequestedParameters


@dataclass(frozen=True, slots=True)
class Collections:
    """What the collections (or tables) are called."""

    datasets: str = "datasets"
    model_configs: str = "model_configs"
    dataset_records: str = "dataset_records"
    runs: str = "runs"
    callbacks: str = "callbacks"


@dataclass(frozen=True, slots=True)
class Selection:
    """Which prompts a run is about: all, or those of one data set.

    ``dataset_id`` matches as text, and as an ObjectId or a number where it reads as one.
    """

    dataset_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPrompt:
    """A prompt to be added, already checked."""

    id: PromptId
    text: str
    requested: RequestedParameters
    dataset_id: str | int | None = None
    priority: float | None = None
    webhook_url: str | None = None
    style_id: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How many prompts stand where. Leases are those of prompts in processing; ``untold`` outcomes are final
    and in no notice yet, ``owed`` ones in none for the prompt's own webhook. ``images`` are the pictures of
    the completed.
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
    errors: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerClaims:
    """What one worker has claimed: how many ``prompts`` are in processing under its name, how many of their
    leases have ``expired``, and when the last of them ends.
    """

    worker: str
    prompts: int
    expired: int
    lease_until: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run of the job.

    ``completed`` and ``failed`` count prompts, ``images`` the pictures that were recorded.
    ``images_per_second`` from the first batch's start to the last record; the steady ones leave out the first
    batch. ``device_busy`` (in [0, 1]) is the device's share of the time from the first batch to the last,
    ``device_busy_of_run`` that of the whole run. ``seconds`` by stage; ``peak_memory`` in bytes.
    ``gpu_hour_price``: dollars that an hour of what the run works on costs, where somebody said so.
    ``worker`` is the name that it claims by.
    ``alive_until`` is what the database says of one that runs: when it has passed, the run's process is gone.
    ``task_index`` and ``execution`` are the platform's, of a run that is one of a job's tasks.
    ``seen_at`` is when it last said that it lives.
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
    alive_until: datetime | None = field(default=None, compare=False)
    seen_at: datetime | None = field(default=None, compare=False)

    @property
    def dollars_per_1000_images(self) -> float | None:
        """What 1,000 images of this run cost: the seconds from its start to its end, loading and all, at the
        hour's price, for each of its ``images``. None without a price, without images, before its end.
        """
        if self.gpu_hour_price is None or self.finished_at is None or not self.images:
            return None
        seconds = (self.finished_at - self.started_at).total_seconds()
        return seconds * self.gpu_hour_price / 3600 / self.images * 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletedPrompt:
    """A completed prompt, as it stands written.

    ``dataset_id`` and ``run_id`` as text; ``image_urls`` are all of its pictures, the first one first, and
    ``scores`` belong to them (None: unscored). ``used`` are its parameters. Of a prompt that was tried
    several times ``iterations`` says how many were used, and ``tries`` holds each as it was recorded.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A prompt that failed for good: ``code`` as it stands written, ``sentence`` for its owner."""

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
    """What a run came to: prompts that are completed and failed, and the pictures of the completed."""

    completed: int
    failed: int
    images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UndeliveredOutcome:
    """A final outcome that somebody has not been told of. Either completed or failed.

    ``image_urls`` are those of a prompt with several pictures, ``score`` is an evaluator's of the first one,
    ``iterations`` how many its loop took, ``attempts`` the prompt's own failures, this one counted in.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingWebhook:
    """A final outcome that the prompt's own webhook is to be told of, under this id and no other.

    ``webhook_url`` is the prompt's, as it stands there now.
    """

    notice_id: str
    run_id: str
    webhook_url: object
    outcome: UndeliveredOutcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """What is to be told by one POST. ``id`` is the webhook id; ``body`` (JSON) never changes.

    ``url`` is where, for a prompt's own webhook, and ``origin`` its scheme, host and port; None is the
    callback's receiver.
    """

    id: str
    run_id: str
    body: str
    tries: int = 0
    url: str | None = None
    origin: str | None = None


def webhook_id() -> str:
    """A new id, ``msg_`` and 128 random bits: the same over all tries of a notice, so receivers know it."""
    return f"msg_{secrets.token_hex(16)}"
