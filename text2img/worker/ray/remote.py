"""A worker's share of a run that several do: the same labour, in a process of its own, at the end of a line.

What happens is said on the line: ``crew`` keeps the run's document and tells of it. Knows no Ray.
"""

from __future__ import annotations

import logging
import os
import socket
import time
import traceback
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from text2img.concurrency.stages import StageTimer
from text2img.concurrency.timeouts import run_with_timeout
from text2img.databases.retrying import with_retries
from text2img.telemetry.progress import NullProgress
from text2img.telemetry.stats import RunStats
from text2img.telemetry.tracing import traces
from text2img.worker import build
from text2img.worker.build import RunContext
from text2img.worker.flow import MAX_RETRY_WAIT
from text2img.worker.leases import Leases
from text2img.worker.local import LocalExecutor
from text2img.worker.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Self

    from text2img.prompts import Outcome, Request
    from text2img.settings import Settings
    from text2img.worker.ray.process import WorkerChannel

log = logging.getLogger("text2img.run")

_GRACE = 3.0
"""Seconds from being asked to end to giving up: less than the run's own, which waits for its workers."""
_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker is given of a run: about ``waiting`` prompts are its to make, and relative paths begin at
    ``folder``, where its machine has one of that name.
    """

    settings: Settings
    run_id: str
    waiting: int
    folder: str


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """The worker has begun. ``name`` is who claims."""

    name: str


@dataclass(frozen=True, slots=True)
class BatchStarted:
    """These go on the worker's device now."""

    requests: Sequence[Request]


@dataclass(frozen=True, slots=True)
class BatchFinished:
    """The worker's device has made so many pictures in so many seconds."""

    pictures: int
    seconds: float


@dataclass(frozen=True, slots=True)
class OutcomesRecorded:
    """These outcomes are written down."""

    outcomes: Sequence[Outcome]


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """What the worker has come to: seconds by stage, bytes of its device's memory, its model."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory: int = 0
    model: str | None = None


@dataclass(frozen=True, slots=True)
class LogRecordMessage:
    """A log record of the worker's."""

    logger: str
    level: int
    message: str
    facts: Mapping[str, object]


def work(share: WorkerSpec, line: WorkerChannel) -> None:
    """Do the share; see Executor.work. What the process is given besides is its machine's own environment."""
    _log_to(line, share.settings.log_level)
    with suppress(OSError):
        os.chdir(share.folder)
    settings, name = share.settings, build.worker_name()
    with closing(build.database(settings)) as database:
        line.say(WorkerStarted(name))
        deps = replace(build.build(settings, line.stop.wait), callback=None)  # the pool notifies the receiver
        executor = LocalExecutor(settings, deps)
        leases = Leases(database, settings.lease_seconds, lambda: None)
        teller = build.notifier(deps, database, share.run_id, name)

        def recorded(outcomes: Sequence[Outcome]) -> None:
            teller.recorded(outcomes)
            line.say(OutcomesRecorded(outcomes))
            line.say(_spent(executor, stats))

        def force_exit(status: int) -> None:
            with suppress(Exception):
                run_with_timeout(1, leases.release)
            os._exit(status)

        stats, seen = _Tally(line), traces(os.environ, share.run_id, endless=True)
        teller.start()
        try:
            with Watchdog(line.stop, settings.stall_timeout, force_exit, _GRACE) as watchdog:
                executor.work(
                    RunContext(
                        run_id=share.run_id,
                        worker=name,
                        database=with_retries(database, settings.database_patience, line.stop.wait),
                        stop=line.stop,
                        tell=settings.callback_url is not None,
                        seconds=StageTimer(seen.stage),
                        waiting=share.waiting,
                        leases=leases,
                        watchdog=watchdog,
                        progress=seen.wrap_progress(teller.wrap_progress(_Progress(line))),
                        stats=stats,
                        recorded=recorded,
                        serving=_Rests(line),
                        traces=seen,
                        more=None if settings.limit is None else line.ask,
                    )
                )
        finally:
            line.say(_spent(executor, stats))
            teller.close("running", 1)
            seen.close(1, succeeded=True)


def _spent(executor: LocalExecutor, stats: RunStats) -> WorkerStats:
    return WorkerStats(executor.spent(), executor.peak_memory() if stats.made else 0, executor.model)


class _Rests:
    """A worker that finds nothing to claim goes on when it is told to; see Rounds."""

    endless = False

    def __init__(self, line: WorkerChannel) -> None:
        self._line = line

    def another(self, waits: Callable[[], bool], settled: int, due: float | None) -> bool:
        """Wait for the worker's own retry, if it comes soon enough to wait for, else to be told."""
        del waits, settled
        now = time.monotonic()
        if due is not None and due <= now + MAX_RETRY_WAIT:
            self._line.stop.wait(due - now)
            return True
        return self._line.rest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class _Progress(NullProgress):
    """Says which batch is on the device."""

    def __init__(self, line: WorkerChannel) -> None:
        self._line = line

    def batch(self, requests: Sequence[Request]) -> None:
        """See Progress."""
        self._line.say(BatchStarted(requests))


class _Tally(RunStats):
    """Says how long the device took."""

    def __init__(self, line: WorkerChannel) -> None:
        super().__init__()
        self._line = line

    def batch(self, size: int, started: float, ended: float) -> None:
        """See RunStats."""
        super().batch(size, started, ended)
        self._line.say(BatchFinished(size, ended - started))


class _Handler(logging.Handler):
    """Says log records, instead of writing them where only this machine's owner finds them."""

    def __init__(self, line: WorkerChannel) -> None:
        super().__init__()
        self._line = line
        self._host = socket.gethostname()

    def emit(self, record: logging.LogRecord) -> None:
        """As Handler.emit; a stack trace goes with it as a fact."""
        facts = {
            name: value for name, value in vars(record).items() if name not in _FIELDS and name[0] != "_"
        }
        facts |= {"worker_host": self._host, "worker_pid": os.getpid()}
        if record.exc_info and log.isEnabledFor(logging.DEBUG):
            facts["stack_trace"] = "".join(traceback.format_exception(*record.exc_info))
        self._line.say(LogRecordMessage(record.name, record.levelno, record.getMessage(), facts))


def _log_to(line: WorkerChannel, level: str) -> None:
    root = logging.getLogger()
    root.handlers[:] = [_Handler(line)]
    root.setLevel(logging.WARNING)
    logging.getLogger("text2img").setLevel(level)
    logging.captureWarnings(capture=True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
