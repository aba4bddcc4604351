"""Notify a run's receivers in the background, so that a slow or dead one never holds up an image."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from text2img.prompts import Completed, Failed
from text2img.telemetry.progress import MultiProgress
from text2img.webhooks.delivery import MAX_OUTCOMES, TimeLimit, collect, collect_orphaned, deliver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from text2img.databases import Database
    from text2img.prompts import Outcome
    from text2img.telemetry.progress import Progress
    from text2img.webhooks.client import CallbackClient
    from text2img.webhooks.dispatcher import WebhookDispatcher

log = logging.getLogger(__name__)

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

    def __init__(self, database: Database, targets: NotifyTargets, run_id: str, worker: str) -> None:
        self._database, self._run_id, self._worker = database, run_id, worker
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
        collect(self._database, self._run_id, status, final=True)

    def finish(self, timeout: float, stop: threading.Event) -> None:
        """Deliver what is left, for at most ``timeout`` seconds or until ``stop`` is set.

        The next run delivers what remains.
        """
        webhooks: threading.Thread | None = None
        if self._dispatcher is not None:
            webhooks = threading.Thread(target=self._dispatcher.finish, args=(timeout, stop), daemon=True)
            webhooks.start()
        if self._client is not None:
            deliver(self._database, self._client, self._worker, TimeLimit(timeout, stop))
        if webhooks is not None:
            webhooks.join()

    def _collect_batch(self) -> None:
        collected = collect(self._database, self._run_id, "running", final=False)
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
                    collect_orphaned(self._database)
                    must_collect_orphaned = False
                deliver(self._database, client, self._worker, TimeLimit(float("inf"), self._closed))
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
