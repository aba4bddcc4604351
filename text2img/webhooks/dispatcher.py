"""Tells prompts' own webhooks what became of them, beside the work and as soon as it is recorded.

Several backends at once, each by one request at a time; one that is in trouble is left alone for a growing
while, so that it holds up nobody. Knows notices and the database's Telling; knows no HTTP.
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

_AT_ONCE: Final = 8
"""Backends that are told at once."""
_LOOK: Final = 20.0
"""Seconds between looks for what others have left."""
_SOON: Final = 0.25
"""Seconds between looks while something is about to come due: the database's clock may lag behind ours."""
_LATE: Final = 2.0
"""Seconds after which what came due and was not to be had is somebody else's."""
_FORGOTTEN: Final = 600.0
"""Seconds after which it no longer counts that a backend was in trouble."""
_LAST_PROGRESS: Final = 2.0
"""Seconds that the end of a generation waits for its progress to arrive before it."""


@dataclass(slots=True)
class _Backoff:
    """A backend that did not take something: for how often in a row, and until when it is left alone."""

    failures: int = 0
    until: float = 0.0


class WebhookDispatcher:
    """One worker's. Between ``start`` and ``close`` a thread sees to what ``wake`` announces; ``finish``
    tells the rest. ``progress`` is to be told of the work's, and tells it on. ``clock`` counts the seconds;
    ``wait_for(condition, predicate, seconds)`` waits until the predicate is true, for so long at most.
    """

    def __init__(
        self,
        database: Outbox,
        webhooks: Webhooks,
        worker: str,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait_for: Wait = threading.Condition.wait_for,
    ) -> None:
        self._database, self._webhooks, self._worker = database, webhooks, worker
        self._clock, self._wait_for = clock, wait_for
        self._beside = ProgressSender(webhooks.progress, wait_for)
        self.progress = Milestones(self._beside.put)
        self._lease = webhooks.timeout + 10
        self._troubles: dict[str, _Backoff] = {}
        self._put_off: dict[str, ScheduledRetry] = {}
        self._busy: set[str] = set()
        self._changed = threading.Condition()
        self._news = self._again = True
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="courier", daemon=True)

    def start(self) -> None:
        """Begin, with what earlier runs have left."""
        self._thread.start()

    def wake(self) -> None:
        """Something is owed."""
        with self._changed:
            self._news = self._again = True
            self._changed.notify_all()

    def close(self, patience: float) -> None:
        """End the thread, waiting for it so many seconds at the most."""
        self._over.set()
        self.wake()
        if self._thread.is_alive():
            self._thread.join(patience)

    def finish(self, patience: float, stop: threading.Event) -> None:
        """Tell what is left, until nothing comes due within ``patience`` seconds or ``stop`` is set.

        At least one try is made; the whole takes at most the patience and one try. What remains is due at
        once for the next run, or when its receiver asked for it. A database that fails is logged.
        """
        try:
            self._finish(self._clock() + patience, stop)
        except DatabaseFailed as exc:
            log.warning("prompts' webhooks are told by the next run: %s", exc)

    def _finish(self, until: float, stop: threading.Event) -> None:
        collect_webhooks(self._database)
        while not stop.is_set():
            self._send_due(stop, until)
            now, due = self._clock(), self._next_due()
            with self._changed:
                under_way = self._busy or self._again  # whoever was busy a moment ago was passed over
            if now >= until or not (under_way or (due is not None and now + due < until)):
                break
            self._pause(_SOON if due is None else min(due, _SOON))
        with self._changed:
            self._wait_for(self._changed, lambda: not self._busy or stop.is_set(), self._webhooks.timeout + 3)
        self._bring_forward()

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                if self._take_news():
                    collect_webhooks(self._database)
                self._send_due(self._over, float("inf"))
            except Exception as exc:
                # Whatever it was: without this thread a server's prompts would be told of no more.
                log.warning("telling prompts' webhooks has to wait: %s", exc, exc_info=exc)
                self._news = True
                with self._changed:
                    self._wait_for(self._changed, self._over.is_set, _SOON * _LOOK)
            due = self._next_due()
            if not self._pause(_LOOK if due is None else min(due, _LOOK)):
                self._news = self._news or due is None  # others may have died

    def _take_news(self) -> bool:
        with self._changed:
            news, self._news = self._news, False
            return news

    def _pause(self, seconds: float) -> bool:
        """Wait for so long (a moment at least), or until something has changed; returns whether it has."""
        with self._changed:
            self._wait_for(self._changed, lambda: self._again, max(seconds, _SOON))
            changed, self._again = self._again, False
            return changed

    def _send_due(self, stop: threading.Event, until: float) -> None:
        """Have all sent that is due, as far as backends are free and well."""
        while not stop.is_set() and len(self._busy) < _AT_ONCE:
            notification = self._database.claim_notification(
                self._worker, self._lease, webhooks=True, but=self._busy_or_backing_off()
            )
            if notification is None:
                return
            with self._changed:
                self._busy.add(str(notification.origin))
                self._put_off.pop(notification.id, None)
            threading.Thread(target=self._tell, args=(notification,), name="webhook", daemon=True).start()
            if self._clock() >= until:
                return

    def _busy_or_backing_off(self) -> list[str]:
        """The backends that are being told something, or are left alone."""
        now = self._clock()
        with self._changed:
            resting = {origin for origin, trouble in self._troubles.items() if trouble.until > now}
            return sorted(self._busy | resting)

    def _tell(self, notification: Notification) -> None:
        try:
            self._wait_for_progress(notification)
            verdict = self._webhooks.send(notification)
            self._settle(notification, verdict)
        except DatabaseFailed as exc:
            log.warning("what became of webhook %s could not be written down: %s", notification.id, exc)
        finally:
            with self._changed:
                self._busy.discard(str(notification.origin))
                self._again = True
                self._changed.notify_all()

    def _wait_for_progress(self, notification: Notification) -> None:
        with suppress(PromptFailed, ValueError, KeyError, TypeError):  # whoever changed it in the database
            address, body = str(Webhook.of(notification.url)), json.loads(notification.body)
            self._beside.finish(address, body["generation_id"], _LAST_PROGRESS)

    def _settle(self, notification: Notification, verdict: DeliveryResult) -> None:
        """Write down what came of a try."""
        if verdict.result is DeliveryStatus.RETRY:
            log.warning("webhook %s, try %d: %s", notification.id, notification.tries, verdict.detail)
            self._postpone(notification, verdict)
            return
        with self._changed:
            self._troubles.pop(str(notification.origin), None)
        told = verdict.result is DeliveryStatus.DELIVERED
        self._database.complete_notification(notification, told=told, detail=verdict.detail)
        log.log(logging.INFO if told else logging.ERROR, "webhook %s: %s", notification.id, verdict.detail)

    def _postpone(self, notification: Notification, verdict: DeliveryResult) -> None:
        now = self._clock()
        with self._changed:
            trouble = self._troubles.setdefault(str(notification.origin), _Backoff())
            trouble.failures += 1
            wait = max(verdict.wait, verdict.retry_after)
            trouble.until = now + max(exponential_backoff(trouble.failures), verdict.retry_after)
            self._put_off[notification.id] = ScheduledRetry(
                notification, verdict.detail, now + wait, now + verdict.retry_after
            )
        self._database.reschedule_notification(notification, wait, verdict.detail)

    def _next_due(self) -> float | None:
        """Seconds until something of ours may be due, at least 0; None where nothing of ours waits."""
        now = self._clock()
        with self._changed:
            self._put_off = {name: each for name, each in self._put_off.items() if each.due > now - _LATE}
            self._troubles = {
                origin: each for origin, each in self._troubles.items() if each.until > now - _FORGOTTEN
            }
            due = [each.due for each in self._put_off.values()]
            due += [each.until for each in self._troubles.values() if each.until > now - _LATE]
        return max(0.0, min(due) - now) if due else None

    def _bring_forward(self) -> None:
        """Let what waits of our own accord be due at once: the next run may find the backend well."""
        now = self._clock()
        with self._changed:
            put_off, self._put_off = self._put_off, {}
        for each in put_off.values():
            self._database.reschedule_notification(
                each.notification, max(0.0, each.retry_after - now), each.detail
            )
