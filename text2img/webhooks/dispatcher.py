"""Deliver the outcomes of prompts to their own webhooks in the background, as soon as they are recorded.

Several backends are served at once, each by one request at a time. A backend that fails is skipped for a
growing time, so that it does not hold up the others.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from text2img.errors import DatabaseFailed, PromptFailed
from text2img.prompts.webhook_urls import Webhook
from text2img.webhooks.delivery import (
    DeliveryResult,
    DeliveryStatus,
    ScheduledRetry,
    collect_webhooks,
    exponential_backoff,
)
from text2img.webhooks.progress import Milestones, ProgressSender

if TYPE_CHECKING:
    from collections.abc import Callable

    from text2img.databases import Notification, Outbox
    from text2img.webhooks.client import Webhooks
    from text2img.webhooks.progress import Wait

log = logging.getLogger(__name__)

_MAX_CONCURRENCY: Final = 8
"""Backends that are served at once."""
_POLL_INTERVAL: Final = 20.0
"""Seconds between queries for what other workers have left."""
_SHORT_POLL_INTERVAL: Final = 0.25
"""Seconds between queries while something is about to come due: the database's clock may lag behind ours."""
_ERROR_PAUSE: Final = 5.0
"""Seconds until the next query after an unexpected error."""
_MAX_CLOCK_LAG: Final = 2.0
"""Seconds after which a retry that came due and could not be claimed is assumed to be another worker's."""
_BACKOFF_RESET: Final = 600.0
"""Seconds after which a backend's earlier failures no longer count."""
_PROGRESS_TIMEOUT: Final = 2.0
"""Seconds that the end of a generation waits for its progress updates to arrive first."""


@dataclass(slots=True)
class _Backoff:
    """A failing backend: its failures in a row, and until when it is skipped."""

    failures: int = 0
    until: float = 0.0


class WebhookDispatcher:
    """One worker's sender of notifications to the prompts' own webhooks.

    Between ``start`` and ``close`` a thread delivers what ``wake`` announces; ``finish`` delivers the rest.
    ``progress`` receives the run's progress and sends it on. ``clock`` counts the seconds;
    ``wait_for(condition, predicate, seconds)`` waits until the predicate is true, for at most ``seconds``.
    """

    def __init__(
        self,
        outbox: Outbox,
        webhooks: Webhooks,
        worker: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait_for: Wait = threading.Condition.wait_for,
    ) -> None:
        self._outbox, self._webhooks, self._worker = outbox, webhooks, worker
        self._clock, self._wait_for = clock, wait_for
        self._progress_sender = ProgressSender(webhooks.progress, wait_for)
        self.progress = Milestones(self._progress_sender.put)
        self._lease = webhooks.timeout + 10
        self._backoffs: dict[str, _Backoff] = {}  # by origin
        self._retries: dict[str, ScheduledRetry] = {}  # by notification id
        self._busy: set[str] = set()  # origins with a request under way
        self._condition = threading.Condition()
        self._must_collect = self._changed = True
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)

    def start(self) -> None:
        """Start the thread, which begins with what earlier runs have left."""
        self._thread.start()

    def wake(self) -> None:
        """Announce that a webhook is pending."""
        with self._condition:
            self._must_collect = self._changed = True
            self._condition.notify_all()

    def close(self, timeout: float) -> None:
        """End the thread, waiting for it at most ``timeout`` seconds."""
        self._closed.set()
        self.wake()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def finish(self, timeout: float, stop: threading.Event) -> None:
        """Deliver what is left, until nothing comes due within ``timeout`` seconds or ``stop`` is set.

        At least one attempt is made; the whole takes at most the timeout and one attempt. What remains is due
        at once for the next run, or when its receiver asked for it. A database error is logged.
        """
        try:
            self._finish(self._clock() + timeout, stop)
        except DatabaseFailed as exc:
            log.warning("webhook delivery failed; the next run will continue it: %s", exc)

    def _finish(self, deadline: float, stop: threading.Event) -> None:
        collect_webhooks(self._outbox)
        while not stop.is_set():
            self._send_due(stop, deadline)
            now, due = self._clock(), self._next_due()
            with self._condition:
                # After a change, check again: a backend that was busy a moment ago was skipped.
                under_way = self._busy or self._changed
            if now >= deadline or not (under_way or (due is not None and now + due < deadline)):
                break
            self._pause(_SHORT_POLL_INTERVAL if due is None else min(due, _SHORT_POLL_INTERVAL))
        with self._condition:
            self._wait_for(
                self._condition, lambda: not self._busy or stop.is_set(), self._webhooks.timeout + 3
            )
        self._make_due_now()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                if self._take_must_collect():
                    collect_webhooks(self._outbox)
                self._send_due(self._closed, float("inf"))
            except Exception as exc:
                # Whatever the error: without this thread a server would deliver no more webhooks.
                log.warning("webhook delivery failed; retrying in %g s: %s", _ERROR_PAUSE, exc, exc_info=exc)
                self._must_collect = True
                with self._condition:
                    self._wait_for(self._condition, self._closed.is_set, _ERROR_PAUSE)
            due = self._next_due()
            if not self._pause(_POLL_INTERVAL if due is None else min(due, _POLL_INTERVAL)):
                self._must_collect = self._must_collect or due is None  # other workers may have died

    def _take_must_collect(self) -> bool:
        with self._condition:
            must_collect, self._must_collect = self._must_collect, False
            return must_collect

    def _pause(self, seconds: float) -> bool:
        """Wait for ``seconds`` (a moment at least), or until something has changed; return whether it has."""
        with self._condition:
            self._wait_for(self._condition, lambda: self._changed, max(seconds, _SHORT_POLL_INTERVAL))
            changed, self._changed = self._changed, False
            return changed

    def _send_due(self, stop: threading.Event, deadline: float) -> None:
        """Start sending all that is due to backends that are neither busy nor backing off."""
        while not stop.is_set() and len(self._busy) < _MAX_CONCURRENCY:
            notification = self._outbox.claim_notification(
                self._worker, self._lease, webhooks=True, exclude_origins=self._busy_or_backing_off()
            )
            if notification is None:
                return
            with self._condition:
                self._busy.add(str(notification.origin))
                self._retries.pop(notification.id, None)
            threading.Thread(target=self._deliver, args=(notification,), name="webhook", daemon=True).start()
            if self._clock() >= deadline:
                return

    def _busy_or_backing_off(self) -> list[str]:
        """Return the origins with a request under way, and those that are skipped for now."""
        now = self._clock()
        with self._condition:
            backing_off = {origin for origin, backoff in self._backoffs.items() if backoff.until > now}
            return sorted(self._busy | backing_off)

    def _deliver(self, notification: Notification) -> None:
        try:
            self._wait_for_progress(notification)
            result = self._webhooks.send(notification)
            self._save_result(notification, result)
        except DatabaseFailed as exc:
            log.warning("the result of webhook %s could not be saved: %s", notification.id, exc)
        finally:
            with self._condition:
                self._busy.discard(str(notification.origin))
                self._changed = True
                self._condition.notify_all()

    def _wait_for_progress(self, notification: Notification) -> None:
        # The notification may have been edited in the database.
        with suppress(PromptFailed, ValueError, KeyError, TypeError):
            address, body = str(Webhook.of(notification.url)), json.loads(notification.body)
            self._progress_sender.finish(address, body["generation_id"], _PROGRESS_TIMEOUT)

    def _save_result(self, notification: Notification, result: DeliveryResult) -> None:
        """Save the result of an attempt in the database."""
        if result.status is DeliveryStatus.RETRY:
            log.warning("webhook %s, attempt %d: %s", notification.id, notification.tries, result.detail)
            self._schedule_retry(notification, result)
            return
        with self._condition:
            self._backoffs.pop(str(notification.origin), None)
        delivered = result.status is DeliveryStatus.DELIVERED
        self._outbox.complete_notification(notification, delivered=delivered, detail=result.detail)
        level = logging.INFO if delivered else logging.ERROR
        log.log(level, "webhook %s: %s", notification.id, result.detail)

    def _schedule_retry(self, notification: Notification, result: DeliveryResult) -> None:
        now = self._clock()
        with self._condition:
            backoff = self._backoffs.setdefault(str(notification.origin), _Backoff())
            backoff.failures += 1
            wait = max(result.wait, result.retry_after)
            backoff.until = now + max(exponential_backoff(backoff.failures), result.retry_after)
            self._retries[notification.id] = ScheduledRetry(
                notification, result.detail, now + wait, now + result.retry_after
            )
        self._outbox.reschedule_notification(notification, wait, result.detail)

    def _next_due(self) -> float | None:
        """Return the seconds until one of our retries may be due, at least 0; None without retries."""
        now = self._clock()
        with self._condition:
            self._retries = {
                name: retry for name, retry in self._retries.items() if retry.due > now - _MAX_CLOCK_LAG
            }
            self._backoffs = {
                origin: backoff
                for origin, backoff in self._backoffs.items()
                if backoff.until > now - _BACKOFF_RESET
            }
            due = [retry.due for retry in self._retries.values()]
            due += [
                backoff.until for backoff in self._backoffs.values() if backoff.until > now - _MAX_CLOCK_LAG
            ]
        return max(0.0, min(due) - now) if due else None

    def _make_due_now(self) -> None:
        """Cancel our own backoff, as the backend may be well for the next run; keep its Retry-After."""
        now = self._clock()
        with self._condition:
            retries, self._retries = self._retries, {}
        for retry in retries.values():
            self._outbox.reschedule_notification(
                retry.notification, max(0.0, retry.retry_after - now), retry.detail
            )
