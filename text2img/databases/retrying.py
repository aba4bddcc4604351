"""A database that repeats a call while the database is unavailable.

The contract allows it: every method may be repeated. If the response to a claim is lost, the claim's lease
expires and its prompts are claimed again.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from text2img.databases import Database
from text2img.errors import DatabaseFailed, WritesRejected

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence

    from text2img.databases import (
        CompletedPrompt,
        Connection,
        Counts,
        NewPrompt,
        Notification,
        Outbox,
        PendingWebhook,
        PutAside,
        Queue,
        Run,
        RunStore,
        RunTotals,
        Selection,
        StoredPrompt,
        UndeliveredOutcome,
        WorkerClaims,
    )
    from text2img.errors import ErrorCode
    from text2img.prompts import Claim, ModelConfiguration, Outcome, Prompt, PromptId

log = logging.getLogger(__name__)

_FIRST_DELAY, _MAX_DELAY = 0.5, 5.0  # seconds

_P = ParamSpec("_P")
_R = TypeVar("_R")


def with_retries(
    database: Database,
    retry_timeout: float,
    wait: Callable[[float], None],
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Database:
    """Return the database with calls that fail only after they have failed for ``retry_timeout`` seconds.

    Once a call has failed, the database counts as lost: from then on every error is raised at once, in every
    thread. Iterating over the results is not retried.

    ``wait(seconds)`` sleeps between attempts; an exception that it raises (a stop) ends the call. ``clock``
    returns seconds.
    """
    retry = _Retry(retry_timeout, wait, clock)
    return Database(
        connection=RetryingConnection(database.connection, retry),
        queue=RetryingQueue(database.queue, retry),
        outbox=RetryingOutbox(database.outbox, retry),
        runs=RetryingRunStore(database.runs, retry),
        results=database.results,
    )


class _Retry:
    """Repeat calls while the database is unavailable; one for all parts, which are lost together."""

    def __init__(
        self, retry_timeout: float, wait: Callable[[float], None], clock: Callable[[], float]
    ) -> None:
        self._retry_timeout, self._wait, self._clock = retry_timeout, wait, clock
        self._lost = threading.Event()

    def __call__(self, method: Callable[_P, _R], /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Return what the method returns; raise DatabaseFailed once it has failed for the timeout."""
        deadline = self._clock() + self._retry_timeout
        delay = _FIRST_DELAY
        while True:
            try:
                return method(*args, **kwargs)
            except WritesRejected:
                raise
            except DatabaseFailed as exc:
                if self._lost.is_set() or self._clock() + delay > deadline:
                    self._lost.set()
                    raise
                log.warning("%s; retrying in %g s", exc, delay)
            self._wait(delay)
            delay = min(delay * 2, _MAX_DELAY)


class RetryingConnection:
    """The Connection with retried calls, documented by the Protocol."""

    def __init__(self, connection: Connection, retry: _Retry) -> None:
        self._connection, self._retry = connection, retry

    def open(self, *, create: bool = True) -> None:
        """See Connection.open."""
        self._retry(self._connection.open, create=create)

    def close(self) -> None:
        """See Connection.close."""
        self._retry(self._connection.close)


class RetryingQueue:
    """The Queue with retried calls, documented by the Protocol."""

    def __init__(self, queue: Queue, retry: _Retry) -> None:
        self._queue, self._retry = queue, retry

    def claim(
        self,
        worker: str,
        limit: int,
        lease_seconds: float,
        selection: Selection,
        put_aside: PutAside | None = None,
    ) -> list[Prompt]:
        """See Queue.claim."""
        return self._retry(self._queue.claim, worker, limit, lease_seconds, selection, put_aside)

    def peek(self, limit: int, selection: Selection) -> list[Prompt]:
        """See Queue.peek."""
        return self._retry(self._queue.peek, limit, selection)

    def start(self, claims: Sequence[Claim], left: Sequence[Claim] = ()) -> None:
        """See Queue.start."""
        self._retry(self._queue.start, claims, left)

    def extend(self, claims: Sequence[Claim], lease_seconds: float) -> list[Claim]:
        """See Queue.extend."""
        return self._retry(self._queue.extend, claims, lease_seconds)

    def holds(self, claim: Claim) -> bool:
        """See Queue.holds."""
        return self._retry(self._queue.holds, claim)

    def record(
        self,
        outcomes: Sequence[Outcome],
        run_id: str,
        *,
        notify: bool,
        put_aside: PutAside | None = None,
    ) -> list[Outcome]:
        """See Queue.record."""
        return self._retry(self._queue.record, outcomes, run_id, notify=notify, put_aside=put_aside)

    def release(self, claims: Sequence[Claim]) -> None:
        """See Queue.release."""
        self._retry(self._queue.release, claims)

    def release_stalled(self, claims: Sequence[Claim]) -> None:
        """See Queue.release_stalled."""
        self._retry(self._queue.release_stalled, claims)

    def release_dead(self, worker: str) -> int:
        """See Queue.release_dead."""
        return self._retry(self._queue.release_dead, worker)

    def check_results(self) -> None:
        """See Queue.check_results."""
        self._retry(self._queue.check_results)

    def check_claim(self, selection: Selection) -> None:
        """See Queue.check_claim."""
        self._retry(self._queue.check_claim, selection)

    def has_claimable(self, selection: Selection) -> bool:
        """See Queue.has_claimable."""
        return self._retry(self._queue.has_claimable, selection)

    def pending(self, selection: Selection) -> int:
        """See Queue.pending."""
        return self._retry(self._queue.pending, selection)

    def postponed(self, selection: Selection) -> int:
        """See Queue.postponed."""
        return self._retry(self._queue.postponed, selection)


class RetryingOutbox:
    """The Outbox with retried calls, documented by the Protocol."""

    def __init__(self, outbox: Outbox, retry: _Retry) -> None:
        self._outbox, self._retry = outbox, retry

    def collect(
        self, run_id: str, notification_id: str, limit: int, max_bytes: int | None = None
    ) -> tuple[list[UndeliveredOutcome], bool]:
        """See Outbox.collect."""
        return self._retry(self._outbox.collect, run_id, notification_id, limit, max_bytes)

    def save_notification(self, notification: Notification) -> None:
        """See Outbox.save_notification."""
        self._retry(self._outbox.save_notification, notification)

    def undelivered_runs(self) -> list[str]:
        """See Outbox.undelivered_runs."""
        return self._retry(self._outbox.undelivered_runs)

    def pending_webhooks(self, limit: int) -> list[PendingWebhook]:
        """See Outbox.pending_webhooks."""
        return self._retry(self._outbox.pending_webhooks, limit)

    def repeat_webhooks(self, ids: Sequence[PromptId]) -> int:
        """See Outbox.repeat_webhooks."""
        return self._retry(self._outbox.repeat_webhooks, ids)

    def repeat_notification(self, notification: Notification) -> None:
        """See Outbox.repeat_notification."""
        self._retry(self._outbox.repeat_notification, notification)

    def enqueue_webhooks(
        self, pending_webhooks: Sequence[PendingWebhook], notifications: Sequence[Notification]
    ) -> None:
        """See Outbox.enqueue_webhooks."""
        self._retry(self._outbox.enqueue_webhooks, pending_webhooks, notifications)

    def claim_notification(
        self,
        worker: str,
        lease_seconds: float,
        *,
        webhooks: bool = False,
        exclude_origins: Collection[str] = (),
    ) -> Notification | None:
        """See Outbox.claim_notification."""
        return self._retry(
            self._outbox.claim_notification,
            worker,
            lease_seconds,
            webhooks=webhooks,
            exclude_origins=exclude_origins,
        )

    def complete_notification(self, notification: Notification, *, delivered: bool, detail: str) -> None:
        """See Outbox.complete_notification."""
        self._retry(self._outbox.complete_notification, notification, delivered=delivered, detail=detail)

    def replace_notification(
        self, notification: Notification, parts: Sequence[Notification], detail: str
    ) -> None:
        """See Outbox.replace_notification."""
        self._retry(self._outbox.replace_notification, notification, parts, detail)

    def reopen_notifications(self) -> int:
        """See Outbox.reopen_notifications."""
        return self._retry(self._outbox.reopen_notifications)

    def reschedule_notification(self, notification: Notification, wait: float, detail: str) -> None:
        """See Outbox.reschedule_notification."""
        self._retry(self._outbox.reschedule_notification, notification, wait, detail)

    def notifications(self, *, webhooks: bool = False) -> tuple[int, int]:
        """See Outbox.notifications."""
        return self._retry(self._outbox.notifications, webhooks=webhooks)

    def undelivered(self, *, webhooks: bool = False) -> int:
        """See Outbox.undelivered."""
        return self._retry(self._outbox.undelivered, webhooks=webhooks)


class RetryingRunStore:
    """The RunStore with retried calls, documented by the Protocol."""

    def __init__(self, runs: RunStore, retry: _Retry) -> None:
        self._runs, self._retry = runs, retry

    def model_configuration(self, config_id: str | None) -> ModelConfiguration | None:
        """See RunStore.model_configuration."""
        return self._retry(self._runs.model_configuration, config_id)

    def begin_run(self, run: Run, lease_seconds: float, replaces: str | None = None) -> bool:
        """See RunStore.begin_run."""
        return self._retry(self._runs.begin_run, run, lease_seconds, replaces)

    def save_run(self, run: Run, lease_seconds: float) -> None:
        """See RunStore.save_run."""
        self._retry(self._runs.save_run, run, lease_seconds)

    def last_runs(self, limit: int) -> list[Run]:
        """See RunStore.last_runs."""
        return self._retry(self._runs.last_runs, limit)

    def run(self, run_id: str) -> Run | None:
        """See RunStore.run."""
        return self._retry(self._runs.run, run_id)

    def run_totals(self, run_id: str) -> RunTotals:
        """See RunStore.run_totals."""
        return self._retry(self._runs.run_totals, run_id)

    def counts(self, selection: Selection) -> Counts:
        """See RunStore.counts."""
        return self._retry(self._runs.counts, selection)

    def claims_by_worker(self, selection: Selection) -> list[WorkerClaims]:
        """See RunStore.claims_by_worker."""
        return self._retry(self._runs.claims_by_worker, selection)

    def enqueue(
        self, prompts: Iterable[NewPrompt], input_file: str | None = None, *, restore: bool = True
    ) -> int:
        """See RunStore.enqueue. Not retried: an iterator yields its prompts only once."""
        return self._runs.enqueue(prompts, input_file, restore=restore)

    def stored(self, ids: Sequence[PromptId]) -> dict[PromptId, NewPrompt | None]:
        """See RunStore.stored."""
        return self._retry(self._runs.stored, ids)

    def requeue_changed(self, prompts: Iterable[NewPrompt]) -> int:
        """See RunStore.requeue_changed. Not retried, for the same reason."""
        return self._runs.requeue_changed(prompts)

    def compare(self, prompts: Sequence[NewPrompt], selection: Selection) -> list[StoredPrompt | None]:
        """See RunStore.compare."""
        return self._retry(self._runs.compare, prompts, selection)

    def left_file(
        self, input_file: str, kept: Container[PromptId], selection: Selection | None = None
    ) -> list[PromptId]:
        """See RunStore.left_file."""
        return self._retry(self._runs.left_file, input_file, kept, selection)

    def remove(self, prompt_ids: Sequence[PromptId], input_file: str) -> int:
        """See RunStore.remove."""
        return self._retry(self._runs.remove, prompt_ids, input_file)

    def save_scores(
        self, prompt: CompletedPrompt, scores: Sequence[float | None], evaluation: Mapping[str, object]
    ) -> bool:
        """See RunStore.save_scores."""
        return self._retry(self._runs.save_scores, prompt, scores, evaluation)

    def retry(self, code: ErrorCode | None, selection: Selection) -> int:
        """See RunStore.retry."""
        return self._retry(self._runs.retry, code, selection)
