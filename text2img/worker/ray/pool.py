"""Several workers, each in a process of its own, that do one run's work over the same claim.

They are heard, started again when they die, and told when nothing is left: who finds nothing to claim waits,
with its model loaded, for what another may have to leave. The leases of the dead run out at once.
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
    joined,
    listen,
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
    from text2img.databases import Database
    from text2img.errors import Text2ImgError
    from text2img.settings import Settings
    from text2img.worker.build import RunContext
    from text2img.worker.ray.process import Cluster

log = logging.getLogger("text2img.run")

DEATHS = 6
"""Times in a row that a worker dies before it is given up: a prompt that kills is abandoned after five."""
_HEAR = 0.25  # seconds
_LOOK = 1.0  # seconds between looks for more to do, while somebody has nothing to do


class WorkerHandle:
    """One of the crew, and how it stands. ``name`` is who claims, once it is here; so many ``places`` of the
    run's limit are its own, for prompts that it has not brought to an end.
    """

    def __init__(self, start: Callable[[], WorkerProcess]) -> None:
        self._start = start
        self.deaths = 0  # in a row, with nothing recorded in between
        self.begin()

    def begin(self) -> None:
        """Start its process, another one where it has died."""
        self.seat = self._start()
        self.name: str | None = None
        self.idle = False
        self.places = 0


class RayExecutor:
    """A run's workers; see Executor. How many they are is settled once Ray has said what is there."""

    def __init__(self, settings: Settings, database: Database, stop: Stop) -> None:
        self._settings, self._stop = settings, stop
        self._database = with_retries(database, settings.database_patience, stop.wait)
        self._selection = build.selection(settings)
        self._members: list[WorkerHandle] = []
        self._spent: dict[WorkerProcess, WorkerStats] = {}
        self._dead: list[str] = []
        self._failures: list[Text2ImgError] = []
        self._left = settings.limit
        self._ended_well = self._asked_to_end = False
        self._looked = 0.0
        self.model: str | None = None

    def work(self, run: RunContext) -> None:
        """Have the work done; see Executor."""
        with joined(self._settings.ray_address) as cluster, run.leases:
            self._stop.check()
            if len(cluster.machines) > 1:
                build.check_shared(self._settings)
            workers, gpu = _how_many(self._settings, cluster)
            run.stats.devices = workers
            log.info("%d workers", workers, extra={"event": "workers", "workers": workers})
            share = WorkerSpec(self._settings, run.run_id, -(-run.waiting // workers), str(Path.cwd()))
            start = partial(WorkerProcess, partial(work, share), gpu=gpu)
            self._members = [WorkerHandle(start) for _ in range(workers)]
            while self._members:
                self._turn(run)
        self._stop.check()
        if self._failures and not self._ended_well:
            raise self._failures[0]
        if self._dead:  # what they had recorded at the last, they may not have said
            came = self._database.settled(run.run_id)
            run.stats.set_totals(came.completed, came.failed, came.images)

    def spent(self) -> dict[str, float]:
        """Of all workers together; see Executor."""
        seconds: Counter[str] = Counter()
        for spent in list(self._spent.values()):
            seconds.update(spent.seconds)
        return dict(seconds)

    def peak_memory(self) -> int:
        """Of the device that needed the most; see Executor."""
        return max((spent.peak_memory for spent in list(self._spent.values())), default=0)

    def _turn(self, run: RunContext) -> None:
        members = {member.seat: member for member in self._members}
        for seat, event in listen(list(members), _HEAR):
            self._heard(run, members[seat], event)
        if self._stop.event.is_set():
            self._end()
        elif time.monotonic() > self._looked + _LOOK and any(member.idle for member in self._members):
            self._looked = time.monotonic()
            self._send_on()

    def _heard(self, run: RunContext, member: WorkerHandle, event: object) -> None:
        match event:
            case OutcomesRecorded(outcomes):
                member.deaths = 0
                member.places -= sum(isinstance(outcome, Completed | Failed) for outcome in outcomes)
                run.stats.add(outcomes)
                run.progress.settled(outcomes)
                run.recorded(outcomes)
            case BatchStarted(requests):
                run.progress.batch(requests)
            case BatchFinished(pictures, seconds):
                now = time.monotonic()
                run.stats.batch(pictures, now - seconds, now)
            case LogRecordMessage(name, level, message, facts):
                logging.getLogger(name).log(level, "%s", message, extra=dict(facts))
            case _:
                self._stands(member, event)

    def _stands(self, member: WorkerHandle, event: object) -> None:
        """The member says how it stands itself."""
        match event:
            case WorkerStarted(name):
                member.name = name
            case WorkerStats():
                self._spent[member.seat] = event
                self.model = event.model or self.model
            case QuotaRequested(wanted):
                granted = wanted if self._left is None else min(wanted, self._left)
                self._give_back(-granted)
                member.places += granted
                member.seat.tell(QuotaGranted(granted))
            case WorkerIdle():
                member.idle = True
            case WorkerExited(failure):
                self._members.remove(member)
                self._has_ended(member, failure)
            case WorkerDied(reason):
                self._has_died(member, reason)

    def _has_ended(self, member: WorkerHandle, failure: Text2ImgError | None) -> None:
        member.seat.leave()
        self._give_back(member.places)
        if failure is None:
            self._ended_well = True
            return
        self._failures.append(failure)
        if self._members:
            log.error("worker %s has failed; the others go on: %s", member.name, failure)

    def _has_died(self, member: WorkerHandle, reason: str) -> None:
        log.warning("worker %s died: %s", member.name or "(still starting)", reason)
        member.deaths += 1
        self._give_back(member.places)
        if member.name is not None:
            self._dead.append(member.name)
        if member.deaths == DEATHS or self._stop.event.is_set():
            self._members.remove(member)
            self._failures.append(
                RunFailed(f"a worker died {member.deaths} times in a row, the last time: {reason}")
            )
            return
        self._bring_back()
        member.begin()

    def _bring_back(self) -> None:
        """What the dead held, if anything, can be claimed again."""
        for name in self._dead:
            self._database.release_dead(name)

    def _give_back(self, prompts: int) -> None:
        if self._left is not None:
            self._left += prompts

    def _send_on(self) -> None:
        """Those who wait go on where there is something to do, and end where everybody waits for nothing."""
        self._bring_back()
        if self._left != 0 and self._database.waits(self._selection):
            self._tell_idle(Resume())
        elif all(member.idle for member in self._members if member.name is not None):
            late = [member for member in self._members if member.name is None]
            self._members = [member for member in self._members if member.name is not None]
            for member in late:
                member.seat.leave()
            self._tell_idle(Resume(further=False))

    def _tell_idle(self, word: Resume) -> None:
        for member in self._members:
            if member.idle:
                member.idle = False
                member.seat.tell(word)

    def _end(self) -> None:
        """The run was asked to end: everybody is, once; who is not here yet has nothing to give back."""
        if self._asked_to_end:
            return
        self._asked_to_end = True
        self._members = [member for member in self._members if member.name is not None]
        for member in self._members:
            member.seat.tell(Shutdown(self._stop.status - 128))


def _how_many(settings: Settings, cluster: Cluster) -> tuple[int, bool]:
    """How many workers, and whether each has a GPU to itself."""
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
