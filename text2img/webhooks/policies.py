"""Tells the callback's receiver beside the work, so that a slow or dead one never holds up a picture."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from text2img.prompts import Completed, Failed
from text2img.telemetry.progress import MultiProgress
from text2img.webhooks.delivery import ENTRY_SIZE, Patience, collect, collect_orphaned, deliver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from text2img.databases import Database
    from text2img.prompts import Outcome
    from text2img.telemetry.progress import Progress
    from text2img.webhooks.client import CallbackClient
    from text2img.webhooks.dispatcher import WebhookDispatcher

log = logging.getLogger(__name__)

_PAUSE = 5.0  # seconds before a database that has failed is asked again


@dataclass(frozen=True, slots=True)
class NotifyTargets:
    """Who is told: a run's ``receiver``, and by the ``courier`` prompts' own webhooks; either may be absent.

    The receiver is told of 1,000 outcomes at once, and ``every`` so many seconds, where given, of those there
    are: then nothing may be left for the last entry.
    """

    receiver: CallbackClient | None = None
    courier: WebhookDispatcher | None = None
    every: float | None = None


class RunNotifier:
    """Tells an audience.

    Between ``start`` and ``close`` a thread tells what earlier runs have left, then of this run.
    ``close`` and ``finish`` tell the rest.
    """

    def __init__(self, database: Database, audience: NotifyTargets, run_id: str, worker: str) -> None:
        self._database, self._run_id, self._worker = database, run_id, worker
        self._receiver, self._courier, self._every = audience.receiver, audience.courier, audience.every
        self._untold = 0
        self._lock = threading.Lock()
        self._enough = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="teller", daemon=True)

    def wrap_progress(self, progress: Progress) -> Progress:
        """The run's progress, told to prompts' own webhooks as well."""
        return progress if self._courier is None else MultiProgress(progress, self._courier.progress)

    def start(self) -> None:
        """Begin to tell."""
        if self._courier is not None:
            self._courier.start()
        if self._receiver is not None:
            self._thread.start()

    def recorded(self, outcomes: Sequence[Outcome]) -> None:
        """These outcomes have been recorded."""
        final = [outcome for outcome in outcomes if isinstance(outcome, Completed | Failed)]
        if self._courier is not None and any(each.prompt.webhook_url is not None for each in final):
            self._courier.wake()
        with self._lock:
            self._untold += len(final)
            if (
                self._untold > ENTRY_SIZE
            ):  # something is left for the last entry, which says that it is the last
                self._enough.set()

    def close(self, status: str, patience: float) -> None:
        """Put what is left into notices; call it while the run still counts as alive, lest another tell it.

        ``patience``: seconds that a try in the middle of which the thread is may still take.
        """
        if self._courier is not None:
            self._courier.close(patience)
        if self._receiver is None:
            return
        self._over.set()
        self._enough.set()
        self._thread.join(patience)
        collect(self._database, self._run_id, status, final=True)

    def finish(self, patience: float, stop: threading.Event) -> None:
        """Tell what is left, for at most ``patience`` seconds or until ``stop`` is set; what remains is the
        next run's to tell.
        """
        own: threading.Thread | None = None
        if self._courier is not None:
            own = threading.Thread(target=self._courier.finish, args=(patience, stop), daemon=True)
            own.start()
        if self._receiver is not None:
            deliver(self._database, self._receiver, self._worker, Patience(patience, stop))
        if own is not None:
            own.join()

    def _gather_some(self) -> None:
        gathered = collect(self._database, self._run_id, "running", final=False)
        with self._lock:
            self._untold -= gathered
            if self._untold <= ENTRY_SIZE:
                self._enough.clear()

    def _tell(self) -> None:
        receiver = self._receiver
        if receiver is None:
            return
        left_over = True
        while not self._over.is_set():
            try:
                if left_over:
                    collect_orphaned(self._database)
                    left_over = False
                deliver(self._database, receiver, self._worker, Patience(float("inf"), self._over))
                self._wait()
                if not self._over.is_set():
                    self._gather_some()
            except Exception as exc:
                # If it is the database, the flow meets the same, and decides; what is untold stays so.
                log.warning("telling the receiver has to wait: %s", exc, exc_info=exc)
                self._over.wait(_PAUSE)

    def _wait(self) -> None:
        """Until there is enough to tell, or anything after ``every`` seconds."""
        while not self._enough.wait(self._every) and not self._untold:
            pass
