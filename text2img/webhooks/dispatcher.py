"""Deliver notifications in the background: claim, send, classify, then reschedule or close.

One machine for both kinds: the callback and the prompts' own webhooks differ in a DeliveryPolicy. Several
receivers are served at once, each by one request at a time. A receiver that fails is skipped for a growing
time, so that it does not hold up the others.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from text2img.errors import DatabaseFailed
from text2img.prompts import Completed, Failed
from text2img.prompts.quoting import plain_text
from text2img.telemetry.progress import MultiProgress
from text2img.webhooks.delivery import (
    CallbackPolicy,
    DeliveryResult,
    DeliveryStatus,
    WebhookPolicy,
    exponential_backoff,
    save_unwritable,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from text2img.databases import Notification, Outbox
    from text2img.prompts import Outcome
    from text2img.telemetry.progress import Progress
    from text2img.webhooks.client import CallbackClient, Webhooks
    from text2img.webhooks.delivery import DeliveryPolicy
    from text2img.webhooks.progress import Wait

log = logging.getLogger(__name__)

_SHORT_POLL_INTERVAL: Final = 0.25
"""Seconds between queries while something is about to come due: the database's clock may lag behind ours."""
_ERROR_PAUSE: Final = 5.0
"""Seconds until the next query after an unexpected error."""
_MAX_CLOCK_LAG: Final = 2.0
"""Seconds after which a retry that came due and could not be claimed is assumed to be another worker's."""
_BACKOFF_RESET: Final = 600.0
"""Seconds after which a receiver's earlier failures no longer count."""


@dataclass(slots=True)
class _Backoff:
    """A failing receiver: its failures in a row, and until when it is skipped."""

    failures: int = 0
    until: float = 0.0


@dataclass(frozen=True, slots=True)
class _ScheduledRetry:
    """A notification that waits for its next attempt.

    By the clock that counts the seconds: ``due`` is when that is, ``retry_after`` until when its receiver
    asked us to wait.
    """

    notification: Notification
    detail: str
    due: float
    retry_after: float


class Dispatcher:
    """One worker's sender of the notifications of one kind, given by the policy.

    Between ``start`` and ``close`` a thread delivers what earlier runs have left and what ``wake`` announces;
    ``finish`` delivers the rest. A notification may be sent twice (a crash between sending and closing), with
    the same id and body. ``clock`` counts the seconds; ``wait_for(condition, predicate, seconds)`` waits
    until the predicate is true, for at most ``seconds``.
    """

    def __init__(
        self,
        outbox: Outbox,
        policy: DeliveryPolicy,
        worker: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait_for: Wait = threading.Condition.wait_for,
    ) -> None:
        self._outbox, self._policy, self._worker = outbox, policy, worker
        self._clock, self._wait_for = clock, wait_for
        self._lease = policy.timeout + 10
        self._backoffs: dict[str, _Backoff] = {}  # by origin
        self._retries: dict[str, _ScheduledRetry] = {}  # by notification id
        self._busy: set[str] = set()  # origins with a request under way
        self._condition = threading.Condition()
        self._must_collect = self._changed = True
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{policy.name} dispatcher", daemon=True)

    def start(self) -> None:
        """Start the thread, which begins with what earlier runs have left."""
        self._thread.start()

    def wake(self) -> None:
        """Announce that there is something to collect."""
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
        except Exception as exc:
            # Whatever the error: the work is done by now, and the notifications are kept.
            unexpected = None if isinstance(exc, DatabaseFailed) else exc
            message = "%s delivery failed; the next run will continue it: %s"
            log.warning(message, self._policy.name, exc, exc_info=unexpected)

    def _finish(self, deadline: float, stop: threading.Event) -> None:
        self._policy.collect()
        while not stop.is_set():
            self._send_due(stop, deadline)
            now, due = self._clock(), self._next_due()
            with self._condition:
                # After a change, check again: a receiver that was busy a moment ago was skipped.
                under_way = self._busy or self._changed
            if now >= deadline or not (under_way or (due is not None and now + due < deadline)):
                break
            self._pause(_SHORT_POLL_INTERVAL if due is None else min(due, _SHORT_POLL_INTERVAL))
        with self._condition:
            self._wait_for(self._condition, lambda: not self._busy or stop.is_set(), self._policy.timeout + 3)
        self._make_due_now()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                if self._take_must_collect():
                    self._policy.collect()
                self._send_due(self._closed, float("inf"))
            except Exception as exc:
                # Whatever the error: without this thread a server would deliver nothing more.
                message = "%s delivery failed; retrying in %g s: %s"
                log.warning(message, self._policy.name, _ERROR_PAUSE, exc, exc_info=exc)
                self._must_collect = True
                with self._condition:
                    self._wait_for(self._condition, self._closed.is_set, _ERROR_PAUSE)
            due, interval = self._next_due(), self._policy.poll_interval
            if not self._pause(interval if due is None else min(due, interval)):
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
        """Start sending all that is due to receivers that are neither busy nor backing off."""
        while not stop.is_set() and len(self._busy) < self._policy.max_concurrency:
            skipped = self._busy_or_backing_off()
            if skipped and not self._policy.webhooks:
                return  # the callback has a single receiver
            notification = self._outbox.claim_notification(
                self._worker, self._lease, webhooks=self._policy.webhooks, exclude_origins=skipped
            )
            if notification is None:
                return
            with self._condition:
                self._busy.add(str(notification.origin))
                self._retries.pop(notification.id, None)
            threading.Thread(target=self._deliver, args=(notification,), name="delivery", daemon=True).start()
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
            self._save_result(notification, self._send(notification))
        except Exception as exc:
            # It is due again when its lease expires.
            message = "the result of %s %s could not be saved: %s"
            unexpected = None if isinstance(exc, DatabaseFailed) else exc
            log.warning(message, self._policy.name, _shown(notification.id), exc, exc_info=unexpected)
        finally:
            with self._condition:
                self._busy.discard(str(notification.origin))
                self._changed = True
                self._condition.notify_all()

    def _send(self, notification: Notification) -> DeliveryResult:
        """Return the result of an attempt; REJECTED for a notification that cannot be sent at all."""
        try:
            _check(notification)
            return self._policy.send(notification)
        except Exception as exc:  # noqa: BLE001 - whatever the database holds
            detail = f"it cannot be sent: {exc if isinstance(exc, _Unsendable) else type(exc).__name__}"
            return DeliveryResult(DeliveryStatus.REJECTED, detail)

    def _save_result(self, notification: Notification, result: DeliveryResult) -> None:
        """Save the result of an attempt in the database."""
        if result.status is DeliveryStatus.RETRY:
            message = "%s %s, attempt %d: %s"
            name = _shown(notification.id)
            log.warning(message, self._policy.name, name, notification.tries, result.detail)
            self._schedule_retry(notification, result)
            return
        with self._condition:
            self._backoffs.pop(str(notification.origin), None)
        too_large = result.status is DeliveryStatus.TOO_LARGE
        parts = self._policy.split(notification) if too_large else None
        if parts is not None:
            self._outbox.replace_notification(notification, parts, result.detail)
            message = "%s %s: %s; sending it in two parts"
            log.info(message, self._policy.name, _shown(notification.id), result.detail)
            return
        delivered = result.status is DeliveryStatus.DELIVERED
        self._outbox.complete_notification(notification, delivered=delivered, detail=result.detail)
        level = logging.INFO if delivered else logging.ERROR
        log.log(level, "%s %s: %s", self._policy.name, _shown(notification.id), result.detail)

    def _schedule_retry(self, notification: Notification, result: DeliveryResult) -> None:
        now = self._clock()
        with self._condition:
            backoff = self._backoffs.setdefault(str(notification.origin), _Backoff())
            backoff.failures += 1
            wait = max(result.wait, result.retry_after)
            backoff.until = now + max(exponential_backoff(backoff.failures), result.retry_after)
            self._retries[notification.id] = _ScheduledRetry(
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
        """Cancel our own backoff, as the receiver may be well for the next run; keep its Retry-After."""
        now = self._clock()
        with self._condition:
            retries, self._retries = self._retries, {}
        for retry in retries.values():
            self._outbox.reschedule_notification(
                retry.notification, max(0.0, retry.retry_after - now), retry.detail
            )


def _shown(notification_id: str) -> str:
    """Return the id for a log line: in ASCII and not long, as another program may have changed it."""
    return str(notification_id).encode("ascii", "backslashreplace").decode()[:200]


def _is_written(outcome: Outcome) -> bool:
    return isinstance(outcome, Failed) and outcome.written


class _Unsendable(ValueError):  # noqa: N818 - named after its cause
    """A notification that no request can be made of, as another program may have left it."""


def _check(notification: Notification) -> None:
    if not re.fullmatch(r"[\x21-\x7e]{1,200}", notification.id):
        raise _Unsendable("its id cannot be a header")
    if not notification.body or notification.body != plain_text(notification.body):
        raise _Unsendable("its body is not text")


@dataclass(frozen=True, slots=True)
class NotifyTargets:
    """Clients of the run's callback and of the prompts' own webhooks; either may be absent.

    ``interval``: see CallbackPolicy.
    """

    callback: CallbackClient | None = None
    webhooks: Webhooks | None = None
    interval: float | None = None


class RunNotifier:
    """Notifier of a run's targets.

    Between ``start`` and ``close`` threads deliver what earlier runs have left, then this run's outcomes.
    ``close`` and ``finish`` deliver the rest.
    """

    def __init__(self, outbox: Outbox, targets: NotifyTargets, run_id: str, worker: str) -> None:
        self._outbox, self._run_id = outbox, run_id
        self._callback = self._webhooks = None
        self._callback_dispatcher = self._webhook_dispatcher = None
        if targets.callback is not None:
            self._callback = CallbackPolicy(outbox, targets.callback, run_id, targets.interval)
            self._callback_dispatcher = Dispatcher(outbox, self._callback, worker)
        if targets.webhooks is not None:
            self._webhooks = WebhookPolicy(outbox, targets.webhooks)
            self._webhook_dispatcher = Dispatcher(outbox, self._webhooks, worker)
        both = (self._callback_dispatcher, self._webhook_dispatcher)
        self._dispatchers = [dispatcher for dispatcher in both if dispatcher is not None]

    def wrap_progress(self, progress: Progress) -> Progress:
        """Return a progress that also reaches the prompts' own webhooks."""
        return progress if self._webhooks is None else MultiProgress(progress, self._webhooks.progress)

    def start(self) -> None:
        """Start the background threads."""
        for dispatcher in self._dispatchers:
            dispatcher.start()

    def wake(self) -> None:
        """Announce that there may be something to deliver."""
        for dispatcher in self._dispatchers:
            dispatcher.wake()

    def recorded(self, outcomes: Sequence[Outcome]) -> None:
        """Announce that these outcomes have been recorded."""
        final = [outcome for outcome in outcomes if isinstance(outcome, Completed) or _is_written(outcome)]
        if self._webhook_dispatcher and any(outcome.prompt.webhook_url is not None for outcome in final):
            self._webhook_dispatcher.wake()
        if self._callback and self._callback_dispatcher and self._callback.recorded(len(final)):
            self._callback_dispatcher.wake()

    def unwritable(self, failed: Failed, *, notify: bool) -> None:
        """Notify of a prompt whose document cannot be written: its targets, once, over all runs.

        ``notify``: the callback's receiver as well. Raises DatabaseFailed.
        """
        save_unwritable(self._outbox, failed, self._run_id, notify=notify)
        self.wake()

    def close(self, status: str, timeout: float) -> None:
        """Collect what is left in notifications. Call it while the run still counts as alive.

        ``timeout``: seconds that each thread may take to end. Raises DatabaseFailed.
        """
        for dispatcher in self._dispatchers:
            dispatcher.close(timeout)
        if self._callback is not None:
            self._callback.collect_last(status)

    def finish(self, timeout: float, stop: threading.Event) -> None:
        """Deliver what is left, for at most ``timeout`` seconds or until ``stop`` is set.

        The next run delivers what remains.
        """
        threads = [
            threading.Thread(target=dispatcher.finish, args=(timeout, stop), daemon=True)
            for dispatcher in self._dispatchers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
