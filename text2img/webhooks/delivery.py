"""Collect undelivered outcomes into notifications and deliver them to the callback's receiver.

Also classifies responses and errors, for the callback and for the prompts' own webhooks.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from text2img.concurrency import timeouts
from text2img.databases import Notification, webhook_id
from text2img.errors import PromptFailed
from text2img.prompts import Completed, Failed
from text2img.prompts.webhook_urls import Webhook
from text2img.telemetry.progress import MultiProgress
from text2img.webhooks.payloads import callback_payload, webhook_payload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from text2img.databases import Outbox, PendingWebhook
    from text2img.prompts import Outcome
    from text2img.telemetry.progress import Progress
    from text2img.webhooks.client import CallbackClient
    from text2img.webhooks.dispatcher import WebhookDispatcher


log = logging.getLogger(__name__)

_MAX_BACKOFF = 60.0  # seconds between attempts, unless the receiver asks for more
_MAX_RETRY_AFTER = 3600.0  # seconds that a receiver may ask us to wait
_RETRYABLE = frozenset({408, 429})


class DeliveryStatus(StrEnum):
    """The kind of result of one delivery attempt."""

    DELIVERED = "delivered"  # 2xx: the receiver has it
    REJECTED = "rejected"  # the receiver will never accept it: 3xx, 410, other 4xx
    RETRY = "retry"  # 408, 429, 5xx, or no answer


@dataclass(frozen=True, slots=True)
class DeliveryResult:
    """The result of one delivery attempt; ``detail`` gives the reason, without anything secret.

    For RETRY, in seconds: ``wait`` is our own backoff, ``retry_after`` what the receiver asked for
    (Retry-After; 0 without it). The next attempt is due after the longer of the two.
    """

    status: DeliveryStatus
    detail: str
    wait: float = 0.0
    retry_after: float = 0.0


def classify_response(origin: str, status: int, retry_after: str | None, tries: int) -> DeliveryResult:
    """Return what the status that ``origin`` answered to attempt number ``tries`` means."""
    detail = f"{origin} answered {status}"
    if 200 <= status < 300:
        return DeliveryResult(DeliveryStatus.DELIVERED, detail)
    if status in _RETRYABLE or status >= 500:
        return DeliveryResult(
            DeliveryStatus.RETRY,
            detail,
            exponential_backoff(tries),
            timeouts.parse_retry_after(retry_after, _MAX_RETRY_AFTER),
        )
    if 300 <= status < 400:
        detail += "; redirects are not followed, give the final address"
    return DeliveryResult(DeliveryStatus.REJECTED, detail)


def describe_error(origin: str, exc: Exception, timeout: float) -> str:
    """Return a message by the kind of error: the libraries' own messages contain the whole URL."""
    import requests

    if isinstance(exc, (TimeoutError, requests.Timeout)):
        return f"{origin} did not answer within {timeout:g} s"
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, AddressRefused):
            return f"{origin} {cause}"
        if isinstance(cause, socket.gaierror):
            return f"{origin} has no address: the host name is unknown"
        if isinstance(cause, ConnectionRefusedError):
            return f"{origin} refuses connections"
        cause = cause.__cause__ or cause.__context__
    kinds = (
        (requests.exceptions.ProxyError, "the proxy fails"),
        (requests.exceptions.SSLError, "TLS fails"),
    )
    reason = next((text for kind, text in kinds if isinstance(exc, kind)), type(exc).__name__)
    return f"{origin} cannot be reached ({reason})"


class AddressRefused(OSError):  # noqa: N818 - named after the event
    """A host name resolves to an address that is not allowed."""


def exponential_backoff(tries: int) -> float:
    """Return the seconds to the next attempt: 1, 2, 4 … 60, less up to a quarter."""
    return timeouts.exponential_backoff(tries, _MAX_BACKOFF)


MAX_OUTCOMES = 1_000
"""Maximum number of outcomes in one notification."""
_MAX_CLOCK_LAG = 2.0  # seconds by which the database's clock may lag behind the wait that we asked for
_POLL_INTERVAL = 0.25  # seconds between claims while a retry is overdue by our clock


def collect(outbox: Outbox, run_id: str, status: str, *, final: bool, limit: int = MAX_OUTCOMES) -> int:
    """Collect a run's undelivered outcomes in notifications of up to ``limit``; return how many outcomes.

    Before the end (``final`` false) one notification is made: call it when more than ``limit`` outcomes wait,
    so that the last notification is not empty. At the end all remaining outcomes are collected and the last
    notification is marked as final; without outcomes there is none. A crash in between loses nothing:
    outcomes marked for a notification that was never saved become undelivered again. Raises DatabaseFailed.
    """
    collected = 0
    more = True
    while more:
        notification_id = webhook_id()
        outcomes, left = outbox.collect(run_id, notification_id, limit)
        if not outcomes:
            break
        body = callback_payload(run_id, status, outcomes, final=final and not left)
        outbox.save_notification(Notification(id=notification_id, run_id=run_id, body=body))
        collected += len(outcomes)
        more = left and final
    return collected


def collect_orphaned(outbox: Outbox) -> int:
    """Collect the outcomes of runs that ended before they could, as ``interrupted``; return how many.

    Raises DatabaseFailed.
    """
    runs = outbox.undelivered_runs()
    return sum(collect(outbox, run_id, "interrupted", final=True) for run_id in runs)


def collect_webhooks(outbox: Outbox, limit: int = MAX_OUTCOMES) -> int:
    """Make a notification of every outcome with a pending webhook; return how many were pending.

    Any worker may, at any time: even if several do, an outcome has one notification. Raises DatabaseFailed.
    """
    collected, more = 0, True
    while more:
        pending = outbox.pending_webhooks(limit)
        if pending:
            notifications = [made for item in pending if (made := _webhook_notification(item))]
            outbox.enqueue_webhooks(pending, notifications)
        collected += len(pending)
        more = len(pending) == limit
    return collected


def _webhook_notification(pending: PendingWebhook) -> Notification | None:
    """Return the notification; None if the prompt no longer has a valid webhook URL."""
    try:
        webhook = Webhook.of(pending.webhook_url)
    except PromptFailed:
        return None
    endpoint, body = webhook_payload(pending.outcome)
    url, origin = webhook.to(endpoint), webhook.origin
    return Notification(id=pending.notification_id, run_id=pending.run_id, body=body, url=url, origin=origin)


@dataclass(frozen=True, slots=True)
class TimeLimit:
    """The time limit of a delivery: ``seconds`` (may be infinite) by ``clock``, or until ``stop`` is set.

    ``stop`` also interrupts the waits between attempts.
    """

    seconds: float
    stop: threading.Event
    clock: Callable[[], float] = time.monotonic


def deliver(outbox: Outbox, client: CallbackClient, worker: str, limit: TimeLimit) -> None:
    """Send what is due, and retry, until nothing is left that comes due within the time limit.

    At least one notification is attempted, however small the limit; the whole takes at most the limit and one
    attempt. A notification that could not be delivered is due at once for the next delivery, or when the
    receiver asked for it. One may be sent twice (a crash between sending and completing), with the same id
    and body. Never raises for what a receiver does; raises DatabaseFailed.
    """
    _Delivery(outbox, client, worker, limit).run()


@dataclass(frozen=True, slots=True)
class ScheduledRetry:
    """A notification that waits for its next attempt.

    By the clock that counts the seconds: ``due`` is when that is, ``retry_after`` until when its receiver
    asked us to wait.
    """

    notification: Notification
    detail: str
    due: float
    retry_after: float


class _Delivery:
    """One call of ``deliver``, and the retries it has scheduled."""

    def __init__(self, outbox: Outbox, client: CallbackClient, worker: str, limit: TimeLimit) -> None:
        self._outbox, self._client, self._worker = outbox, client, worker
        self._stop, self._clock = limit.stop, limit.clock
        self._deadline = self._clock() + limit.seconds
        self._lease = 2 * client.timeout + 10
        self._retries: dict[str, ScheduledRetry] = {}

    def run(self) -> None:
        """Deliver; see ``deliver``."""
        while not self._stop.is_set():
            notification = self._outbox.claim_notification(self._worker, self._lease)
            if notification is not None:
                self._attempt(notification)
            elif not self._wait():
                break
            if self._clock() >= self._deadline:
                break
        self._make_due_now()

    def _attempt(self, notification: Notification) -> None:
        self._retries.pop(notification.id, None)
        result = self._client.send(notification)
        if result.status is DeliveryStatus.RETRY:
            log.warning("callback %s, attempt %d: %s", notification.id, notification.tries, result.detail)
            self._schedule_retry(notification, result)
            return
        delivered = result.status is DeliveryStatus.DELIVERED
        self._outbox.complete_notification(notification, delivered=delivered, detail=result.detail)
        level = logging.INFO if delivered else logging.ERROR
        log.log(level, "callback %s: %s", notification.id, result.detail)

    def _schedule_retry(self, notification: Notification, result: DeliveryResult) -> None:
        now = self._clock()
        wait = max(result.wait, result.retry_after)
        self._outbox.reschedule_notification(notification, wait, result.detail)
        self._retries[notification.id] = ScheduledRetry(
            notification, result.detail, now + wait, now + result.retry_after
        )

    def _wait(self) -> bool:
        """Wait until our next retry is due; return False if none comes due in time."""
        now = self._clock()
        # A retry overdue by more than the clocks can differ was claimed by another worker.
        due = [retry.due for retry in self._retries.values() if retry.due > now - _MAX_CLOCK_LAG]
        if not due or min(due) >= self._deadline:
            return False
        self._stop.wait(max(_POLL_INTERVAL, min(due) - now))
        return True

    def _make_due_now(self) -> None:
        """Cancel our own backoff, as the receiver may be well for the next delivery; keep its Retry-After."""
        now = self._clock()
        for retry in self._retries.values():
            self._outbox.reschedule_notification(
                retry.notification, max(0.0, retry.retry_after - now), retry.detail
            )


_ERROR_PAUSE = 5.0  # seconds until the next attempt after a database error


@dataclass(frozen=True, slots=True)
class NotifyTargets:
    """A run's callback ``client`` and the ``dispatcher`` of prompts' own webhooks; either may be absent.

    The callback is sent in batches of 1,000 outcomes, or also every ``interval`` seconds, if given. With an
    interval, the final callback may be empty and is then not sent.
    """

    client: CallbackClient | None = None
    dispatcher: WebhookDispatcher | None = None
    interval: float | None = None


class RunNotifier:
    """Notifier of a run's targets.

    Between ``start`` and ``close`` a thread delivers what earlier runs have left, then this run's outcomes.
    ``close`` and ``finish`` deliver the rest.
    """

    def __init__(self, outbox: Outbox, targets: NotifyTargets, run_id: str, worker: str) -> None:
        self._outbox, self._run_id, self._worker = outbox, run_id, worker
        self._client, self._dispatcher = targets.client, targets.dispatcher
        self._interval = targets.interval
        self._uncollected = 0
        self._lock = threading.Lock()
        self._batch_ready = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="notifier", daemon=True)

    def wrap_progress(self, progress: Progress) -> Progress:
        """Return a progress that also reaches the prompts' own webhooks."""
        return progress if self._dispatcher is None else MultiProgress(progress, self._dispatcher.progress)

    def start(self) -> None:
        """Start the background threads."""
        if self._dispatcher is not None:
            self._dispatcher.start()
        if self._client is not None:
            self._thread.start()

    def recorded(self, outcomes: Sequence[Outcome]) -> None:
        """Announce that these outcomes have been recorded."""
        final = [outcome for outcome in outcomes if isinstance(outcome, Completed | Failed)]
        if self._dispatcher is not None and any(outcome.prompt.webhook_url is not None for outcome in final):
            self._dispatcher.wake()
        with self._lock:
            self._uncollected += len(final)
            # More than one batch: something is left for the last notification, which is marked as final.
            if self._uncollected > MAX_OUTCOMES:
                self._batch_ready.set()

    def close(self, status: str, timeout: float) -> None:
        """Collect what is left in notifications. Call it while the run still counts as alive.

        Otherwise another run would collect the outcomes as those of a dead run. ``timeout``: seconds that the
        thread may take for an attempt that is under way.
        """
        if self._dispatcher is not None:
            self._dispatcher.close(timeout)
        if self._client is None:
            return
        self._closed.set()
        self._batch_ready.set()
        self._thread.join(timeout)
        collect(self._outbox, self._run_id, status, final=True)

    def finish(self, timeout: float, stop: threading.Event) -> None:
        """Deliver what is left, for at most ``timeout`` seconds or until ``stop`` is set.

        The next run delivers what remains.
        """
        webhooks: threading.Thread | None = None
        if self._dispatcher is not None:
            webhooks = threading.Thread(target=self._dispatcher.finish, args=(timeout, stop), daemon=True)
            webhooks.start()
        if self._client is not None:
            deliver(self._outbox, self._client, self._worker, TimeLimit(timeout, stop))
        if webhooks is not None:
            webhooks.join()

    def _collect_batch(self) -> None:
        collected = collect(self._outbox, self._run_id, "running", final=False)
        with self._lock:
            self._uncollected -= collected
            if self._uncollected <= MAX_OUTCOMES:
                self._batch_ready.clear()

    def _run(self) -> None:
        client = self._client
        if client is None:
            return
        must_collect_orphaned = True
        while not self._closed.is_set():
            try:
                if must_collect_orphaned:
                    collect_orphaned(self._outbox)
                    must_collect_orphaned = False
                deliver(self._outbox, client, self._worker, TimeLimit(float("inf"), self._closed))
                self._wait()
                if not self._closed.is_set():
                    self._collect_batch()
            except Exception as exc:
                # If the database fails, the worker fails as well and decides. Nothing is lost: the outcomes
                # stay undelivered.
                log.warning("callback delivery failed; retrying in %g s: %s", _ERROR_PAUSE, exc, exc_info=exc)
                self._closed.wait(_ERROR_PAUSE)

    def _wait(self) -> None:
        """Wait until a batch is ready or, with an interval, until any outcome has waited for it."""
        while not self._batch_ready.wait(self._interval) and not self._uncollected:
            pass
