"""One worker of the pool in its own process: it runs as a local worker does and reports events to the pool.

The events go through a message channel. The pool keeps the run's document and sends the run's notifications.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import traceback
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from text2img.concurrency.stages import StageTimer
from text2img.concurrency.timeouts import run_with_timeout
from text2img.databases.retrying import with_retries
from text2img.telemetry.progress import NullProgress, RunStats
from text2img.telemetry.tracing import traces
from text2img.worker import build
from text2img.worker.flow import MAX_RETRY_WAIT
from text2img.worker.job import LocalExecutor
from text2img.worker.leases import Leases
from text2img.worker.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self

    from text2img.prompts import Outcome, Request
    from text2img.settings import Settings
    from text2img.worker.ray.process import WorkerChannel

log = logging.getLogger("text2img.run")

_GRACE = 3.0
"""Seconds from a shutdown request to the forced exit: less than those of the run, which waits for workers."""
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker needs to know of a run.

    About ``waiting`` prompts are expected for this worker. Relative paths begin at ``folder``, if its machine
    has a folder of that name.
    """

    settings: Settings
    run_id: str
    waiting: int
    folder: str


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """The worker has started, and claims under ``name`` once the run has answered with Resume."""

    name: str


@dataclass(frozen=True, slots=True)
class BatchStarted:
    """A batch of these requests goes on the worker's device."""

    requests: Sequence[Request]


@dataclass(frozen=True, slots=True)
class BatchFinished:
    """The worker's device has made a batch: the number of images, and the seconds it took."""

    images: int
    seconds: float


@dataclass(frozen=True, slots=True)
class OutcomesRecorded:
    """The worker has recorded these outcomes."""

    outcomes: Sequence[Outcome]


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """The worker's totals so far: seconds by stage, bytes of its device's memory, its model."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    model: str | None = None


@dataclass(frozen=True, slots=True)
class LogRecordMessage:
    """A log record of the worker's."""

    logger: str
    level: int
    message: str
    fields: Mapping[str, object]


def work(spec: WorkerSpec, channel: WorkerChannel) -> None:
    """Run one worker of the run; see Executor.work. The environment is that of the worker's machine."""
    _send_logs(channel, spec.settings.log_level)
    with suppress(OSError):
        os.chdir(spec.folder)
    settings, name = spec.settings, build.worker_name()
    with closing(build.database(settings)) as database:
        channel.send(WorkerStarted(name))
        # The pool sends the run's callback; a worker only delivers prompts' own webhooks.
        deps = replace(build.build(settings, channel.stop.wait), callback=None)
        executor = LocalExecutor(settings, deps)
        leases = Leases(database.queue, settings.lease_seconds, lambda: None)
        notifier = build.notifier(deps, database.outbox, spec.run_id, name)

        def recorded(outcomes: Sequence[Outcome]) -> None:
            notifier.recorded(outcomes)
            channel.send(OutcomesRecorded(outcomes))
            channel.send(_worker_stats(executor, stats))

        def force_exit(status: int) -> None:
            with suppress(Exception):
                run_with_timeout(1, partial(leases.release, stalled=status == 1))
            os._exit(status)

        stats, run_traces = _ReportingStats(channel), traces(os.environ, spec.run_id, long_running=True)
        progress = run_traces.wrap_progress(notifier.wrap_progress(_ReportingProgress(channel)))
        notifier.start()
        channel.wait_for_start()
        try:
            with Watchdog(channel.stop, settings.stall_timeout, force_exit, _GRACE) as watchdog:
                executor.work(
                    build.RunContext(
                        run_id=spec.run_id,
                        worker=name,
                        database=with_retries(database, settings.database_patience, channel.stop.wait),
                        stop=channel.stop,
                        notify=settings.callback_url is not None,
                        seconds=StageTimer(run_traces.stage),
                        waiting=spec.waiting,
                        leases=leases,
                        watchdog=watchdog,
                        progress=progress,
                        stats=stats,
                        recorded=recorded,
                        unwritable=partial(notifier.unwritable, notify=settings.callback_url is not None),
                        serving=_PoolWorkSource(channel),
                        traces=run_traces,
                        more=None if settings.limit is None else channel.request_quota,
                    )
                )
        finally:
            channel.send(_worker_stats(executor, stats))
            notifier.close("running", 1)
            run_traces.close(1, succeeded=True)


def _worker_stats(executor: LocalExecutor, stats: RunStats) -> WorkerStats:
    return WorkerStats(executor.spent(), executor.peak_memory() if stats.made else 0, executor.model)


class _PoolWorkSource:
    """Work source of a worker in the pool: an idle worker resumes on the pool's message; see WorkSource."""

    long_running = False

    def __init__(self, channel: WorkerChannel) -> None:
        self._channel = channel

    def wait_for_work(self, has_work: Callable[[], bool], recorded: int, next_retry_at: float | None) -> bool:
        """Wait for the worker's own retry, if it is due soon enough, else for the pool's message."""
        del has_work, recorded
        now = time.monotonic()
        if next_retry_at is not None and next_retry_at <= now + MAX_RETRY_WAIT:
            self._channel.stop.wait(next_retry_at - now)
            return True
        return self._channel.wait_for_work()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class _ReportingProgress(NullProgress):
    """Progress that reports each batch that goes on the device."""

    def __init__(self, channel: WorkerChannel) -> None:
        self._channel = channel

    def batch(self, requests: Sequence[Request]) -> None:
        """Report the batch; see Progress."""
        self._channel.send(BatchStarted(requests))


class _ReportingStats(RunStats):
    """Statistics that also report how long the device took."""

    def __init__(self, channel: WorkerChannel) -> None:
        super().__init__()
        self._channel = channel

    def batch(self, size: int, started: float, ended: float) -> None:
        """Add and report a batch; see RunStats."""
        super().batch(size, started, ended)
        self._channel.send(BatchFinished(size, ended - started))


class _ChannelHandler(logging.Handler):
    """Log handler that sends records to the run, instead of writing them on the worker's machine."""

    def __init__(self, channel: WorkerChannel) -> None:
        super().__init__()
        self._channel = channel
        self._host = socket.gethostname()

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record; see Handler.emit. A stack trace becomes one of its fields."""
        fields = {
            name: value
            for name, value in vars(record).items()
            if name not in _STANDARD_FIELDS and name[0] != "_"
        }
        fields |= {"worker_host": self._host, "worker_pid": os.getpid()}
        if record.exc_info and log.isEnabledFor(logging.DEBUG):
            fields["stack_trace"] = "".join(traceback.format_exception(*record.exc_info))
        self._channel.send(LogRecordMessage(record.name, record.levelno, record.getMessage(), fields))


def _send_logs(channel: WorkerChannel, level: str) -> None:
    """Configure logging of this process so that its records go to the run."""
    root = logging.getLogger()
    root.handlers[:] = [_ChannelHandler(channel)]
    root.setLevel(logging.WARNING)
    logging.getLogger("text2img").setLevel(level)
    logging.captureWarnings(capture=True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
