"""From untold outcomes to told ones: gather them into entries, deliver the entries. Knows no HTTP."""

from __future__ import annotations

import logging
import socket
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from text2img.concurrency import timeouts
from text2img.databases import Notification, webhook_id
from text2img.errors import PromptFailed
from text2img.prompts.webhook_urls import Webhook
from text2img.webhooks.payloads import callback_payload, webhook_payload

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable

    from text2img.databases import Outbox, PendingWebhook
    from text2img.webhooks.client import CallbackClient

log = logging.getLogger(__name__)

_LONGEST_WAIT = 60.0  # seconds between tries of our own accord
_LONGEST_ASKED = 3600.0  # seconds for which a receiver may put us off
_AGAIN = frozenset({408, 429})


class DeliveryStatus(StrEnum):
    """How a try went."""

    DELIVERED = "told"  # 2xx: the receiver has it
    REJECTED = "refused"  # it will never take it: 3xx, 410, other 4xx
    RETRY = "later"  # 408, 429, 5xx, or nobody answered


@dataclass(frozen=True, slots=True)
class DeliveryResult:
    """A try's result; ``detail`` says why, without anything secret.

    For LATER, in seconds: ``wait`` is what we would wait, ``asked`` what the receiver has asked for
    (Retry-After; 0 where it has not). The next try is due after the longer of the two.
    """

    result: DeliveryStatus
    detail: str
    wait: float = 0.0
    retry_after: float = 0.0


def classify_response(shown: str, status: int, retry_after: str | None, tries: int) -> DeliveryResult:
    """What the answer of ``shown`` to so many tries means."""
    detail = f"{shown} answered {status}"
    if 200 <= status < 300:
        return DeliveryResult(DeliveryStatus.DELIVERED, detail)
    if status in _AGAIN or status >= 500:
        return DeliveryResult(
            DeliveryStatus.RETRY,
            detail,
            exponential_backoff(tries),
            timeouts.parse_retry_after(retry_after, _LONGEST_ASKED),
        )
    if 300 <= status < 400:
        detail += "; redirects are not followed, give the final address"
    return DeliveryResult(DeliveryStatus.REJECTED, detail)


def describe_error(shown: str, exc: Exception, timeout: float) -> str:
    """What went wrong, by kind: the libraries' own words hold the whole URL."""
    import requests

    if isinstance(exc, (TimeoutError, requests.Timeout)):
        return f"{shown} did not answer within {timeout:g} s"
    cause: BaseException | None = exc
    while cause is not None:
        if isinstance(cause, AddressRefused):
            return f"{shown} {cause}"
        if isinstance(cause, socket.gaierror):
            return f"{shown} has no address: the name is not known"
        if isinstance(cause, ConnectionRefusedError):
            return f"{shown} refuses connections"
        cause = cause.__cause__ or cause.__context__
    kinds = (
        (requests.exceptions.ProxyError, "the proxy fails"),
        (requests.exceptions.SSLError, "TLS fails"),
    )
    reason = next((words for kind, words in kinds if isinstance(exc, kind)), type(exc).__name__)
    return f"{shown} cannot be reached ({reason})"


class AddressRefused(OSError):  # noqa: N818 - it says what happened
    """A name leads to an address that it must not have."""


def exponential_backoff(tries: int) -> float:
    """Seconds to the next try: 1, 2, 4 … 60, less up to a quarter."""
    return timeouts.exponential_backoff(tries, _LONGEST_WAIT)


ENTRY_SIZE = 1_000
"""Outcomes in one entry at the most."""
_LATE = 2.0  # seconds by which the database's clock may lag behind the wait that we asked for
_POLL = 0.25  # seconds between looks during those


def collect(database: Outbox, run_id: str, status: str, *, final: bool, limit: int = ENTRY_SIZE) -> int:
    """Put a run's untold outcomes into entries of at most ``limit``; returns how many outcomes.

    Before the end (``final`` false) one entry is made: call it when more than ``limit`` outcomes wait, so
    that something is left for the last one. At the end all that are left are gathered and the last entry is
    marked as final; nothing left makes no entry. A crash in between loses nothing: what was marked for an
    entry that was never kept becomes untold again. Raises DatabaseFailed.
    """
    gathered = 0
    more = True
    while more:
        notice_id = webhook_id()
        outcomes, left = database.collect(run_id, notice_id, limit)
        if not outcomes:
            break
        body = callback_payload(run_id, status, outcomes, final=final and not left)
        database.save_notification(Notification(id=notice_id, run_id=run_id, body=body))
        gathered += len(outcomes)
        more = left and final
    return gathered


def collect_orphaned(database: Outbox) -> int:
    """Do that, with status ``interrupted``, for runs that ended before they could; returns how many outcomes.

    Raises DatabaseFailed.
    """
    runs = database.undelivered_runs()
    return sum(collect(database, run_id, "interrupted", final=True) for run_id in runs)


def collect_webhooks(database: Outbox, limit: int = ENTRY_SIZE) -> int:
    """Make a notice of every outcome that is owed to its prompt's own webhook; returns how many were owed.

    Any worker may, at any time: however many do, an outcome has one notice. Raises DatabaseFailed.
    """
    gathered, more = 0, True
    while more:
        pending_webhooks = database.pending_webhooks(limit)
        if pending_webhooks:
            database.enqueue_webhooks(
                pending_webhooks, [notification for each in pending_webhooks if (notification := _own(each))]
            )
        gathered += len(pending_webhooks)
        more = len(pending_webhooks) == limit
    return gathered


def _own(pending_webhooks: PendingWebhook) -> Notification | None:
    """The notice; None where the prompt has no address any more."""
    try:
        webhook = Webhook.of(pending_webhooks.webhook_url)
    except PromptFailed:
        return None
    word, body = webhook_payload(pending_webhooks.outcome)
    url, origin = webhook.to(word), webhook.origin
    return Notification(
        id=pending_webhooks.notice_id, run_id=pending_webhooks.run_id, body=body, url=url, origin=origin
    )


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a delivery may go on: for so many ``seconds`` (which may be infinite) by ``clock``, or until
    ``stop`` is set, which is also what it waits for between tries.
    """

    seconds: float
    stop: threading.Event
    clock: Callable[[], float] = time.monotonic


def deliver(database: Outbox, receiver: CallbackClient, worker: str, patience: Patience) -> None:
    """Send what is due, and again what was put off, until nothing is left that comes due within the patience.

    At least one entry is tried, however small the patience; the whole takes at most the patience and one
    try. What could not be told is due at once for the next delivery, or when the receiver asked for it. An
    entry may be sent twice (a crash between sending and closing), with the same id and body. Never raises
    for what a receiver does; raises DatabaseFailed.
    """
    _Delivery(database, receiver, worker, patience).run()


@dataclass(frozen=True, slots=True)
class ScheduledRetry:
    """A notice that waits for its next try: when it is due, and until when its receiver asked us to wait, by
    the clock that counts the seconds.
    """

    notification: Notification
    detail: str
    due: float
    retry_after: float


class _Delivery:
    """One call of ``deliver``, and what it has put off."""

    def __init__(self, database: Outbox, receiver: CallbackClient, worker: str, patience: Patience) -> None:
        self._database, self._receiver, self._worker = database, receiver, worker
        self._stop, self._clock = patience.stop, patience.clock
        self._until = self._clock() + patience.seconds
        self._lease = 2 * receiver.timeout + 10
        self._waiting: dict[str, ScheduledRetry] = {}

    def run(self) -> None:
        """As deliver."""
        while not self._stop.is_set():
            notification = self._database.claim_notification(self._worker, self._lease)
            if notification is not None:
                self._try(notification)
            elif not self._wait():
                break
            if self._clock() >= self._until:
                break
        self._bring_forward()

    def _try(self, notification: Notification) -> None:
        self._waiting.pop(notification.id, None)
        verdict = self._receiver.send(notification)
        if verdict.result is DeliveryStatus.RETRY:
            log.warning("callback %s, try %d: %s", notification.id, notification.tries, verdict.detail)
            self._put_off(notification, verdict)
            return
        told = verdict.result is DeliveryStatus.DELIVERED
        self._database.complete_notification(notification, told=told, detail=verdict.detail)
        log.log(logging.INFO if told else logging.ERROR, "callback %s: %s", notification.id, verdict.detail)

    def _put_off(self, notification: Notification, verdict: DeliveryResult) -> None:
        now = self._clock()
        wait = max(verdict.wait, verdict.retry_after)
        self._database.reschedule_notification(notification, wait, verdict.detail)
        self._waiting[notification.id] = ScheduledRetry(
            notification, verdict.detail, now + wait, now + verdict.retry_after
        )

    def _wait(self) -> bool:
        """Wait until the next of ours is due; False where none comes due in time."""
        now = self._clock()
        # Those overdue by more than clocks can differ are with another worker.
        due = [put_off.due for put_off in self._waiting.values() if put_off.due > now - _LATE]
        if not due or min(due) >= self._until:
            return False
        self._stop.wait(max(_POLL, min(due) - now))
        return True

    def _bring_forward(self) -> None:
        """Let what waits of our own accord be due at once: the next delivery may find the receiver well."""
        now = self._clock()
        for put_off in self._waiting.values():
            self._database.reschedule_notification(
                put_off.notification, max(0.0, put_off.retry_after - now), put_off.detail
            )
