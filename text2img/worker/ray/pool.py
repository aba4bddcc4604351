"""The pool of worker processes that do one run's work, each claiming from the same queue.

The pool handles their events, restarts workers that die, and shuts them down when the queue is empty. An idle
worker keeps its model loaded: a failing one may release prompts. The leases of a dead worker expire at once.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from text2img.databases.retrying import with_retries
from text2img.errors import ConfigurationError, RunFailed
from text2img.prompts import Completed, Failed
from text2img.worker import build
from text2img.worker.ray.process import (
    QuotaGranted,
    QuotaRequested,
    Resume,
    Shutdown,
    WorkerDied,
    WorkerExited,
    WorkerIdle,
    WorkerProcess,
    next_events,
    ray_cluster,
)
from text2img.worker.ray.remote import (
    BatchFinished,
    BatchStarted,
    LogRecordMessage,
    OutcomesRecorded,
    WorkerSpec,
    WorkerStarted,
    WorkerStats,
    work,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from text2img.concurrency.signals import Stop
    from text2img.databases import Database, Selection
    from text2img.errors import Text2ImgError
    from text2img.prompts import Outcome
    from text2img.settings import Settings
    from text2img.worker.build import RunContext
    from text2img.worker.ray.process import Cluster

log = logging.getLogger("text2img.run")

MAX_CONSECUTIVE_DEATHS = 6
"""Deaths in a row after which a worker is not restarted: a prompt that kills is abandoned after five."""
_EVENT_TIMEOUT = 0.25  # seconds
_POLL_INTERVAL = 1.0  # seconds between queries for more work, while a worker is idle


class WorkerHandle:
    """One worker of the pool, and its state.

    ``name`` is the name it claims under, None while it starts. ``quota`` is its share of the run's limit: the
    prompts that it was granted and that have no final outcome yet.
    """

    def __init__(self, start_process: Callable[[], WorkerProcess]) -> None:
        self._start_process = start_process
        self.deaths = 0  # in a row, with nothing recorded in between
        self.start()

    def start(self) -> None:
        """Start its process, or a new one after its process died."""
        self.process = self._start_process()
        self.name: str | None = None
        self.idle = False
        self.quota = 0


class RayExecutor:
    """A run's pool of workers; see Executor. Its size is known once Ray has reported the cluster."""

    def __init__(self, settings: Settings, database: Database, stop: Stop) -> None:
        self._settings, self._stop = settings, stop
        self._database = with_retries(database, settings.database_patience, stop.wait)
        self._selection = build.selection(settings)
        self._workers: list[WorkerHandle] = []
        self._stats: dict[WorkerProcess, WorkerStats] = {}
        self._dead_workers: list[str] = []
        self._failures: list[Text2ImgError] = []
        self._limit_left = settings.limit
        self._any_succeeded = self._shutdown_sent = False
        self._last_poll = 0.0
        self.model: str | None = None

    def work(self, run: RunContext) -> None:
        """Start the workers and handle their events until all have ended; see Executor."""
        with ray_cluster(self._settings.ray_address) as cluster, run.leases:
            self._stop.check()
            if len(cluster.machines) > 1:
                build.check_shared(self._settings)
            workers, gpu = _pool_size(self._settings, cluster)
            run.stats.devices = workers
            log.info("%d workers", workers, extra={"event": "workers", "workers": workers})
            spec = WorkerSpec(self._settings, run.run_id, -(-run.waiting // workers), str(Path.cwd()))
            start_process = partial(WorkerProcess, partial(work, spec), gpu=gpu)
            self._workers = [WorkerHandle(start_process) for _ in range(workers)]
            while self._workers:
                self._poll(run)
        self._stop.check()
        if self._failures and not self._any_succeeded:
            raise self._failures[0]
        if self._dead_workers:  # they may have recorded more outcomes than they reported
            totals = self._database.runs.run_totals(run.run_id)
            run.stats.set_totals(totals.completed, totals.failed, totals.images)

    def spent(self) -> dict[str, float]:
        """Return the seconds by stage of all workers together; see Executor."""
        seconds: Counter[str] = Counter()
        for stats in list(self._stats.values()):
            seconds.update(stats.seconds)
        return dict(seconds)

    def peak_memory(self) -> int:
        """Return the peak memory of the device that needed the most; see Executor."""
        return max((stats.peak_memory for stats in list(self._stats.values())), default=0)

    def _poll(self, run: RunContext) -> None:
        workers = {worker.process: worker for worker in self._workers}
        for process, event in next_events(list(workers), _EVENT_TIMEOUT):
            self._handle_event(run, workers[process], event)
        if self._stop.event.is_set():
            self._shut_down()
            return
        idle = any(worker.idle for worker in self._workers)
        if idle and time.monotonic() > self._last_poll + _POLL_INTERVAL:
            self._last_poll = time.monotonic()
            self._resume_or_finish(run.excluded.apply(self._selection))

    def _handle_event(self, run: RunContext, worker: WorkerHandle, event: object) -> None:
        """Handle an event that concerns the run."""
        match event:
            case OutcomesRecorded(outcomes):
                worker.deaths = 0
                outcomes = [outcome for outcome in outcomes if _is_news(run, outcome)]
                worker.quota -= sum(_is_claimed(outcome) for outcome in outcomes)
                run.stats.add(outcomes)
                run.progress.recorded(outcomes)
                run.recorded(outcomes)
            case BatchStarted(requests):
                run.progress.batch(requests)
            case BatchFinished(images, seconds):
                now = time.monotonic()
                run.stats.batch(images, now - seconds, now)
            case LogRecordMessage(name, level, message, fields):
                logging.getLogger(name).log(level, "%s", message, extra=dict(fields))
            case _:
                self._handle_worker_event(worker, event)

    def _handle_worker_event(self, worker: WorkerHandle, event: object) -> None:
        """Handle an event that concerns the worker's own state."""
        match event:
            case WorkerStarted(name):
                worker.name = name
                worker.process.send(Resume())
            case WorkerStats():
                self._stats[worker.process] = event
                self.model = event.model or self.model
            case QuotaRequested(wanted):
                granted = wanted if self._limit_left is None else min(wanted, self._limit_left)
                self._return_quota(-granted)
                worker.quota += granted
                worker.process.send(QuotaGranted(granted))
            case WorkerIdle():
                worker.idle = True
            case WorkerExited(failure):
                self._workers.remove(worker)
                self._on_exit(worker, failure)
            case WorkerDied(reason):
                self._on_death(worker, reason)

    def _on_exit(self, worker: WorkerHandle, failure: Text2ImgError | None) -> None:
        worker.process.kill()
        self._return_quota(worker.quota)
        if failure is None:
            self._any_succeeded = True
            return
        self._failures.append(failure)
        if self._workers:
            log.error("worker %s failed; the others continue: %s", worker.name, failure)

    def _on_death(self, worker: WorkerHandle, reason: str) -> None:
        log.warning("worker %s died: %s", worker.name or "(still starting)", reason)
        worker.deaths += 1
        self._return_quota(worker.quota)
        if worker.name is not None:
            self._dead_workers.append(worker.name)
        if worker.deaths == MAX_CONSECUTIVE_DEATHS or self._stop.event.is_set():
            self._workers.remove(worker)
            self._failures.append(
                RunFailed(f"a worker died {worker.deaths} times in a row, the last time: {reason}")
            )
            return
        self._release_dead_claims()
        worker.start()

    def _release_dead_claims(self) -> None:
        """Make the claims of dead workers available again, if they held any."""
        for name in self._dead_workers:
            self._database.queue.release_dead(name)

    def _return_quota(self, prompts: int) -> None:
        if self._limit_left is not None:
            self._limit_left += prompts

    def _resume_or_finish(self, selection: Selection) -> None:
        """Resume the idle workers if there is work; end the pool if there is none and all are idle."""
        self._release_dead_claims()
        if self._limit_left != 0 and self._database.queue.has_claimable(selection):
            self._notify_idle(Resume())
        elif all(worker.idle for worker in self._workers if worker.name is not None):
            starting = [worker for worker in self._workers if worker.name is None]
            self._workers = [worker for worker in self._workers if worker.name is not None]
            for worker in starting:
                worker.process.kill()
            self._notify_idle(Resume(more_work=False))

    def _notify_idle(self, message: Resume) -> None:
        for worker in self._workers:
            if worker.idle:
                worker.idle = False
                worker.process.send(message)

    def _shut_down(self) -> None:
        """Ask every worker to end, once; one that is still starting has nothing to release."""
        if self._shutdown_sent:
            return
        self._shutdown_sent = True
        self._workers = [worker for worker in self._workers if worker.name is not None]
        for worker in self._workers:
            worker.process.send(Shutdown(self._stop.status - 128))


def _is_claimed(outcome: Outcome) -> bool:
    """Return True for an outcome that ends a claim of the worker's share of the limit."""
    return isinstance(outcome, Completed) or (isinstance(outcome, Failed) and outcome.written)


def _is_news(run: RunContext, outcome: Outcome) -> bool:
    """Return False for a document that another worker has found to be unwritable before."""
    if isinstance(outcome, Failed) and not outcome.written:
        return run.excluded.put_aside(outcome.claim.id, outcome.message)
    return True


def _pool_size(settings: Settings, cluster: Cluster) -> tuple[int, bool]:
    """Return the number of workers, and whether each has its own GPU."""
    gpu = settings.hosted_model is None and settings.device in {"auto", "cuda"} and cluster.gpus > 0
    if settings.device == "cuda" and not gpu:
        raise ConfigurationError("--device cuda: the Ray cluster has no GPU")
    if settings.workers in {"auto", None}:
        return (cluster.gpus if gpu else 1), gpu
    workers = int(settings.workers or 1)
    if gpu and workers > cluster.gpus and settings.ray_address is None:
        raise ConfigurationError(
            f"--workers {workers}: each needs a GPU, and this machine has {cluster.gpus}; use --workers auto"
        )
    return workers, gpu
