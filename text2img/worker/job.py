"""One run of the job: its executor, its document in the database, its summary line and its end.

Cloud Run, Kubernetes (indexed jobs) and Google Batch each number a job's tasks from 0. The number does not
distribute the work (the claims do that): it distinguishes tasks in documents and logs.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import secrets
import socket
import threading
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Final, Protocol

from text2img import __version__
from text2img.concurrency.stages import StageTimer
from text2img.concurrency.timeouts import run_with_timeout
from text2img.databases import Run
from text2img.databases.retrying import with_retries
from text2img.errors import ConfigurationError, DatabaseFailed, RunFailed, Stopped
from text2img.telemetry.progress import DEVICE_STAGES, RunStats
from text2img.telemetry.terminal import print_lines, print_result, shorten
from text2img.telemetry.tracing import traces
from text2img.worker import build
from text2img.worker.flow import Worker
from text2img.worker.leases import Leases
from text2img.worker.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from text2img.concurrency.signals import Stop
    from text2img.databases import Counts, Database
    from text2img.engine import Engine
    from text2img.prompts import Parameters
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress
    from text2img.worker.build import Dependencies, RunContext
    from text2img.worker.polling import PollingLoop


_INDEX_VARIABLES: Final = ("CLOUD_RUN_TASK_INDEX", "JOB_COMPLETION_INDEX", "BATCH_TASK_INDEX")
_EXECUTION_VARIABLES: Final = ("CLOUD_RUN_EXECUTION", "BATCH_JOB_UID")


@dataclass(frozen=True, slots=True)
class Task:
    """One task of a job.

    ``index``: from 0; ``execution``: the platform's name of this execution of the job. None: unknown.
    """

    index: int | None = None
    execution: str | None = None


def current_task(environment: Mapping[str, str] = os.environ, host: str | None = None) -> Task:
    """Return the task that this process is; with neither index nor execution outside a job.

    Kubernetes has no name for the execution: there it is the pod's host name without the index at its end.
    """
    indexes = (environment.get(name, "") for name in _INDEX_VARIABLES)
    index = next((int(text) for text in indexes if text.isascii() and text.isdigit()), None)
    execution = next((environment[name] for name in _EXECUTION_VARIABLES if environment.get(name)), None)
    if execution is None and environment.get("JOB_COMPLETION_INDEX"):
        job, dash, suffix = (host or socket.gethostname()).rpartition("-")
        execution = job if dash and suffix == environment["JOB_COMPLETION_INDEX"] else None
    return Task(index, execution)


def task_instance() -> str:
    """Return this process's name at a push gateway: its task index if it has one, else the host.

    A platform's hosts get new names each time, and a gateway never drops a group by itself.
    """
    index = current_task().index
    return socket.gethostname() if index is None else str(index)


def new_run(run_id: str | None) -> Run:
    """Return the document of a new run, under the given id or a generated one.

    A generated id is unique and sorts by the run's start. All tasks of a job get the same id: each adds its
    index, and so has its own document and its own outcomes to deliver. A task that is retried continues under
    its id, as does a run that is started again with it.
    """
    task, now = current_task(), datetime.now(UTC)
    if not run_id:
        run_id = f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
    elif task.index is not None:
        run_id = f"{run_id}-{task.index}"
    return Run(
        id=run_id,
        started_at=now,
        host=socket.gethostname(),
        task_index=task.index,
        execution=task.execution,
    )


def take_up(known: Run | None, run: Run) -> tuple[Run, str | None]:
    """Return the run as it begins under an id that may be ``known``, and the dead worker that has the id.

    Raises ConfigurationError if a live worker works under it. A worker of this machine is alive if its
    process is; of another machine nothing is known but its lease.
    """
    if known is None:
        return run, None
    resumed = replace(run, started_at=known.started_at, tries=known.tries + 1, resumed_at=run.started_at)
    until = known.alive_until
    if known.status != "running" or until is None or until <= run.started_at:
        return resumed, None
    if not _is_gone(known.worker, run.host):
        raise _held(run.id, known.worker, until)
    return resumed, known.worker


def _held(run_id: str, worker: str | None, until: datetime | None = None) -> ConfigurationError:
    lease = "" if until is None else f" (its lease ends at {until:%Y-%m-%d %H:%M:%S} UTC)"
    return ConfigurationError(
        f"the run {shorten(run_id)} is in progress at {shorten(worker or 'another worker')}{lease}; wait for"
        " its end, or choose another --run-id (RUN_ID)"
    )


def _is_gone(worker: str | None, host: str) -> bool:
    """Return True if the worker's name is one of this host's, and its process has ended."""
    named = re.fullmatch(r"(.+)-([0-9]{1,9})-[0-9a-f]{8}", worker or "", re.ASCII)
    if named is None or named[1] != host or int(named[2]) == os.getpid():
        return False
    try:
        os.kill(int(named[2]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def mark_logs(task: Task) -> None:
    """Add the task's index and execution to every log record of the root handlers."""
    fields = {"task_index": task.index, "execution": task.execution}
    known = {name: value for name, value in fields.items() if value is not None}

    def mark(record: logging.LogRecord) -> bool:
        vars(record).update(known)
        return True

    for handler in logging.getLogger().handlers:
        handler.addFilter(mark)


class Executor(Protocol):
    """Does a run's work. The properties may be read at any time, from any thread."""

    @property
    def model(self) -> str | None:
        """The name of the model, once it is known."""
        ...

    def work(self, run: RunContext) -> None:
        """Work until nothing is left to claim.

        Raises RunFailed when a part has failed, Stopped when the run was asked to end, and
        ConfigurationError for what is found to be wrong before the first claim.
        """
        ...

    def spent(self) -> dict[str, float]:
        """Return the seconds spent so far, by stage."""
        ...

    def peak_memory(self) -> int:
        """Return the most bytes of the device's memory that were in use at once; see Engine."""
        ...


class LocalExecutor:
    """One worker in this process. See Executor."""

    def __init__(self, settings: Settings, deps: Dependencies) -> None:
        self._settings, self._deps = settings, deps
        self._run: RunContext | None = None
        self._engine: Engine | None = None
        self.model: str | None = None

    def work(self, run: RunContext) -> None:
        """Check storage, evaluator and model, as far as that needs no weights, and work; see Executor."""
        self._run = run
        self._deps.storage.check()
        if self._deps.evaluator is not None:
            self._deps.evaluator.check()
        configuration = run.database.runs.model_configuration(self._settings.model_config_id)
        engine = self._engine = build.engine(self._settings, configuration, run.stop.wait)
        model_info = engine.inspect()
        self.model = model_info.name
        requested = build.run_defaults(self._settings, model_info, configuration)
        build.validate_defaults(self._deps, model_info, requested)
        with run.serving or nullcontext():
            Worker(self._deps, run, engine, model_info, requested).run()
        engine.close()  # the last notifications may take a while, and need no weights

    def spent(self) -> dict[str, float]:
        """See Executor."""
        stages = self._run.seconds.seconds() if self._run else {}
        return {**stages, **(self._engine.seconds if self._engine else {})}

    def peak_memory(self) -> int:
        """See Executor."""
        return self._engine.peak_memory() if self._engine else 0


def summary_line(
    stats: RunStats, spent: Mapping[str, float], remaining: str, cost: float | None, location: str
) -> str:
    """Return the line that a run ends with: how many, how fast, where the time went, where the images are.

    ``spent`` is in seconds by stage, ``cost`` in dollars for 1,000 images; ``location`` is the storage's URL.
    """
    several = f" ({stats.images} images)" if stats.images != stats.completed else ""
    done = f"completed {stats.completed}{several}, failed {stats.failed}, remaining {remaining}"
    score = [] if stats.score is None else [f"mean score {stats.score:.2f}"]
    unused = stats.negatives_left_out
    dropped = [f"{unused} without their negative prompt, which has no effect"] if unused else []
    score += [f"{stats.unscored} without a score (retry --unscored)"] if stats.unscored else []
    pace = f"{stats.images_per_second:.2f} images/s"
    priced = [] if cost is None else [dollars(cost)]
    return "; ".join([done, *dropped, *score, pace, *_where_time_went(stats, spent), *priced, location])


def steps_and_guidance(parameters: Parameters) -> str:
    """Return both as text, for a line on what the model is called with."""
    guidance = parameters.guidance_scale
    guided = "no guidance" if guidance is None else f"guidance {guidance:g}"
    return f"{parameters.num_inference_steps} steps, {guided}"


def dollars(cost: float) -> str:
    """Return the cost of 1,000 images as text; below a dollar, to a hundredth of a cent."""
    return f"${cost:,.2f} per 1,000 images" if cost >= 1 else f"${cost:.4f} per 1,000 images"


def remaining(left: Counts, later: int) -> str:
    """Return as text how many prompts remain, ``later`` of them retries, and how many others work on."""
    waits = f" ({later} to be tried again later)" if later else ""
    others = f", {left.processing} with other workers" if left.processing else ""
    return f"{left.pending}{waits}{others}"


def _where_time_went(stats: RunStats, spent: Mapping[str, float]) -> list[str]:
    """Return the parts of the line on time: the device thread's main stages; none without a batch."""
    if not stats.made:
        return []
    whole = stats.seconds
    most = [f"{stage} {spent[stage]:.1f}" for stage in DEVICE_STAGES if spent.get(stage, 0) >= whole / 100]
    busy = f"device busy {100 * stats.device_busy:.0f} % between first and last batch"
    return [f"{whole:.1f} s: {', '.join(most)}", busy]


_LIBRARIES: Final = (
    *("torch", "diffusers", "transformers", "peft"),
    *("pymongo", "google-cloud-storage", "boto3", "pillow"),
)


def versions() -> dict[str, str]:
    """Return the versions of Python, text2img and the libraries that are installed, by name."""
    known = {"python": platform.python_version(), "text2img": __version__}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            known[name] = version(name)
    return known


log = logging.getLogger("text2img.run")

_NOTIFY_INTERVAL = 2.0  # seconds for which a server collects outcomes for one callback
_SHUTDOWN_TIMEOUT = 3.0  # seconds for a failed or stopped run to record its end and notify of it
_ON_STOP_TIMEOUT = 2.0  # seconds for the summary files of a run that was stopped
_RELEASE_TIMEOUT = 1.0  # seconds to release the claims of a run that is forced to exit
_SAVE_TIMEOUT = 0.5  # seconds to record then how it ended


class Job:
    """One run: its document, its notifications, its summary line and its end. ``executor`` does the work.

    With ``serving`` it is a server's: the model is loaded though nothing waits, and the end is the server's.
    """

    def __init__(  # noqa: PLR0913 - what a run needs
        self,
        settings: Settings,
        deps: Dependencies,
        database: Database,
        *,
        executor: Executor,
        stop: Stop,
        serving: PollingLoop | None = None,
    ) -> None:
        self._serving = serving
        self._settings, self._database, self._executor, self._stop = settings, database, executor, stop
        self._selection = deps.selection
        self._name = build.worker_name()
        new = new_run(settings.run_id)
        new, self._replaces = take_up(database.runs.run(new.id) if settings.run_id else None, new)
        self._run = replace(new, worker=self._name, gpu_hour_price=settings.gpu_hour_price)
        every = None if serving is None else _NOTIFY_INTERVAL
        self._notifier = build.notifier(deps, database.outbox, self._run.id, self._name, every=every)
        self._leases = Leases(database.queue, settings.lease_seconds, lambda: self._save("running"))
        self.traces = traces(os.environ, self._run.id, long_running=serving is not None)
        self._ended: str | None = None
        self._finished_at: datetime | None = None
        self.stats = RunStats()

    def run(self, progress: Progress, on_end: Callable[[Run], None] | None = None) -> None:
        """Run, and print the summary line, whatever the end.

        ``on_end`` is called with the run's document once the run has ended well or was stopped, if it
        recorded anything; after a stop it gets little time.
        """
        try:
            with Watchdog(self._stop, self._settings.stall_timeout, self.force_exit) as watchdog:
                try:
                    self.execute(progress, watchdog)
                except Stopped:
                    if on_end is not None and self.stats.recorded:
                        with suppress(Exception):  # the stop is what the run ends with
                            run_with_timeout(_ON_STOP_TIMEOUT, partial(on_end, self._state("stopped")))
                    raise
                if on_end is not None and self.stats.recorded:
                    on_end(self._state("completed"))
        except (Stopped, RunFailed):
            self.print_partial_summary(1)
            raise
        print_lines(self.summary())

    def execute(self, progress: Progress, watchdog: Watchdog) -> None:
        """Work through what is pending. A run that finds nothing touches neither storage nor model."""
        waiting = self._database.queue.pending(self._selection)
        log.info("prompts waiting: %d", waiting, extra={"event": "start", "run_id": self._run.id})
        status, worked = "failed", waiting > 0 or self._serving is not None
        if worked and not self._database.runs.begin_run(
            self._state("running"), self._settings.lease_seconds, self._replaces
        ):
            raise _held(self._run.id, None)
        progress = self.traces.wrap_progress(self._notifier.wrap_progress(progress))
        self._notifier.start()
        try:
            if worked:
                self._work(waiting, progress, watchdog)
            status = "completed"
        except (Stopped, RunFailed):
            status = "stopped" if self._stop.event.is_set() else "failed"
            self._stop.check()  # a failure during shutdown must not replace the signal's exit status
            raise
        finally:
            progress.end()
            self._ended, self._finished_at = status, datetime.now(UTC)
            self._close(status, worked=worked)
        self._stop.check()

    def summary(self) -> str:
        """Return the line that a run ends with."""
        left, later = (
            self._database.runs.counts(self._selection),
            self._database.queue.postponed(self._selection),
        )
        return self._line(remaining(left, later))

    def document(self) -> dict[str, object]:
        """Return what ``run --json`` prints: the counts, the speed and the times of the summary line.

        ``status`` is the exit status.
        """
        left = self._database.runs.counts(self._selection)
        so_far = replace(self._run, finished_at=self._end_or_now(), images=self.stats.images)
        stats = self.stats
        return {
            "status": 3 if stats.failed else 0,
            "run_id": self._run.id,
            "model": self._executor.model,
            "completed": stats.completed,
            "failed": stats.failed,
            "errors": {str(code): count for code, count in stats.failures.items()},
            "remaining": left.pending,
            "postponed": self._database.queue.postponed(self._selection),
            "processing": left.processing,
            "images": stats.images,
            "negative_prompts_left_out": stats.negatives_left_out,
            "mean_score": stats.score,
            "images_per_second": stats.images_per_second,
            "seconds": (self._end_or_now() - self._run.started_at).total_seconds(),
            "seconds_by_stage": self.spent(),
            "device_busy": stats.device_busy,
            "dollars_per_1000_images": so_far.dollars_per_1000_images,
            "output": self._settings.output_url,
        }

    def print_partial_summary(self, seconds: float) -> None:
        """Print the line of a run that ends early, with what the database answers within ``seconds``.

        Never raises: how the run ended must not be hidden by what comes after.
        """
        line = self._line("unknown")
        with suppress(Exception):
            line = run_with_timeout(seconds, self.summary)
        with suppress(OSError, RunFailed):
            print_lines(line, flush=True)

    def _line(self, left: str) -> str:
        so_far = replace(self._run, finished_at=self._end_or_now(), images=self.stats.images)
        cost = so_far.dollars_per_1000_images
        return summary_line(self.stats, self.spent(), left, cost, self._settings.output_url)

    def wake_notifier(self) -> None:
        """Announce that there may be notifications that this run has not recorded itself."""
        self._notifier.wake()

    def lost(self) -> int:
        """Return how many claims other workers have taken over so far."""
        return self._leases.lost

    def spent(self) -> dict[str, float]:
        """Return the seconds spent so far, by stage."""
        return self._executor.spent()

    def force_exit(self, status: int) -> None:
        """Exit at once; before that, release the claims and record the end, if that takes no time.

        With status 1 the device has stalled.
        """
        with suppress(Exception):
            run_with_timeout(_RELEASE_TIMEOUT, partial(self._leases.release, stalled=status == 1))
        with suppress(Exception):
            run_with_timeout(
                _SAVE_TIMEOUT, lambda: self._save(self._ended or ("failed" if status == 1 else "stopped"))
            )
        self.print_partial_summary(0)
        error = "the device hangs" if status == 1 else f"stopped by signal {status - 128}"
        with suppress(OSError, RunFailed):
            print_result({"error": error, "status": status})
        logging.shutdown()
        os._exit(status)

    def _work(self, waiting: int, progress: Progress, watchdog: Watchdog) -> None:
        progress.begin(None if self._serving else min(waiting, self._settings.limit or waiting))
        self._executor.work(
            build.RunContext(
                run_id=self._run.id,
                worker=self._name,
                database=with_retries(self._database, self._settings.database_patience, self._stop.wait),
                waiting=waiting,
                notify=self._settings.callback_url is not None,
                leases=self._leases,
                watchdog=watchdog,
                progress=progress,
                stats=self.stats,
                seconds=StageTimer(self.traces.stage),
                stop=self._stop,
                recorded=self._notifier.recorded,
                unwritable=partial(self._notifier.unwritable, notify=self._settings.callback_url is not None),
                serving=self._serving,
                traces=self.traces,
            )
        )

    def _save(self, status: str) -> None:
        """Save the run's document; while it runs, this also is its heartbeat."""
        self._database.runs.save_run(self._state(status), self._settings.lease_seconds)

    def _state(self, status: str) -> Run:
        stats, executor = self.stats, self._executor
        return replace(
            self._run,
            status=status,
            model=executor.model,
            finished_at=None if status == "running" else self._end_or_now(),
            completed=stats.completed,
            failed=stats.failed,
            images=stats.images,
            postponed=stats.postponed,
            images_per_second=round(stats.images_per_second, 4),
            steady_images_per_second=round(stats.steady_images_per_second, 4),
            device_busy=round(stats.device_busy, 4),
            device_busy_of_run=round(stats.device_busy_of_run, 4),
            # Not before the first batch: while its libraries are being imported, an engine has no figure.
            peak_memory=executor.peak_memory() if stats.made else 0,
            seconds={stage: round(spent, 3) for stage, spent in self.spent().items()},
            versions=versions(),
        )

    def _end_or_now(self) -> datetime:
        """Return when the work ended; now, while it goes on."""
        return self._finished_at or datetime.now(UTC)

    def _close(self, status: str, *, worked: bool) -> None:
        """Record the run's end and notify of it; a failed database has been reported already."""
        try:
            if status == "completed":
                self._end(status, self._settings.callback_patience, self._stop.event, worked=worked)
            else:
                timeout = min(self._settings.callback_patience, 2)
                run_with_timeout(
                    _SHUTDOWN_TIMEOUT, lambda: self._end(status, timeout, threading.Event(), worked=worked)
                )
        except (DatabaseFailed, TimeoutError) as exc:
            if status == "completed":
                self._stop.check()
                raise
            log.warning("the run's end could not be recorded: %s", exc)

    def _end(self, status: str, timeout: float, stop: threading.Event, *, worked: bool) -> None:
        self._notifier.close(status, timeout)
        if worked:
            self._save(status)
        self._notifier.finish(timeout, stop)
