"""Workers as they are, on devices that sleep: a process carries several, each with a database of its own.

What works is ``text2img.worker.flow.Worker`` with its claims ahead, marks, leases, encoding and records, and
what is told is gathered. Not there: a model, an image worth encoding, a storage, a receiver, another host.
"""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from benchmarks.fleet.watch import Log, count_commands, together, watched
from benchmarks.stub import StubEngine
from text2img.concurrency.signals import Stop
from text2img.databases import Run, Selection
from text2img.databases.retrying import with_retries
from text2img.errors import ObjectUnreadable, Stopped
from text2img.prompts import RequestedParameters
from text2img.telemetry.progress import NullProgress
from text2img.webhooks.delivery import collect
from text2img.worker.build import Dependencies, RunContext
from text2img.worker.flow import Worker
from text2img.worker.leases import Leases
from text2img.worker.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from text2img.databases import Database

_SIDE = 64  # pixels, the fewest that a prompt may ask for
_STEPS = 4
_WISHES = RequestedParameters(num_inference_steps=_STEPS, guidance_scale=1.0, width=_SIDE, height=_SIDE)
_LEASE = 60.0
_PATIENCE = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """What each worker has to do: ``share`` prompts in batches of ``batch``, ``seconds`` a picture.

    The last one begins ``ramp`` seconds after the first. After ``limit`` seconds all are asked to end, as by
    a signal.
    """

    url: str
    share: int
    batch: int
    seconds: float
    ramp: float
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a process's workers came to. Moments are ``time.monotonic``'s, which a machine's processes share.

    ``worked`` are the seconds of all its workers' runs, ``pictures`` is how many the devices made, ``cpu``
    the process's processor seconds.
    """

    begun: float
    ended: float
    worked: float
    cpu: float
    pictures: int
    log: Log


class Nowhere:
    """A storage that keeps nothing and takes no time; see ImageStorage."""

    def check(self) -> None:
        """Nothing; see ImageStorage."""

    def check_writable(self) -> None:
        """Nothing; see ImageStorage."""

    def put(
        self,
        name: str,
        data: bytes,
        content_type: str,
        may_replace: Callable[[], bool],
        classify: object = None,
    ) -> str:
        """The URL that it would have; see ImageStorage."""
        del data, content_type, may_replace, classify
        return f"gs://nowhere/generated/{name}"

    def read(self, url: str) -> bytes:
        """Never: nothing is there; see ImageStorage."""
        raise ObjectUnreadable(f"{url} is nowhere")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hand:
    """One worker, with what is its own. ``after`` so many seconds it begins."""

    name: str
    after: float
    database: Database
    engine: StubEngine


def carry(
    shift: Shift,
    workers: range,
    of: int,
    ready: Callable[[], object],
    after: Callable[[float, Callable[[], object]], threading.Timer] = threading.Timer,
) -> Done:
    """Let these ``workers`` of so many do their shares, from when every process is ready.

    ``after(shift.limit, stop)``, once it is started, ends them.
    """
    commands, logs = Log(), [Log() for _ in workers]
    count_commands(commands)
    crew = [
        _Hand(
            name=f"worker-{number}",
            after=shift.ramp * number / of,
            database=watched(shift.url, log),
            engine=StubEngine(_SIDE, shift.seconds, _STEPS),
        )
        for number, log in zip(workers, logs, strict=True)
    ]
    ready()
    for log in (commands, *logs):  # what opening took is no worker's work
        log.forget()
    begun, cpu = time.monotonic(), time.process_time()
    stop = Stop()
    worked = _let_work(shift, crew, stop, after(shift.limit, lambda: stop.set(signal.SIGTERM)))
    return Done(
        begun=begun,
        ended=time.monotonic(),
        worked=worked,
        cpu=time.process_time() - cpu,
        pictures=sum(hand.engine.made for hand in crew),
        log=together([commands, *logs]),
    )


def _let_work(shift: Shift, crew: Sequence[_Hand], stop: Stop, over: threading.Timer) -> float:
    """The seconds that all of them worked, until ``over`` stopped them at the latest."""
    over.start()
    with ThreadPoolExecutor(len(crew)) as threads:
        working = [threads.submit(_work, shift, hand, stop) for hand in crew]
    over.cancel()
    return sum(each.result() for each in working)


def _work(shift: Shift, hand: _Hand, stop: Stop) -> float:
    """The seconds of a worker's run."""
    time.sleep(hand.after)
    begun = time.monotonic()
    with closing(hand.database), suppress(Stopped):
        _run(shift, hand, stop)
    return time.monotonic() - begun


def _run(shift: Shift, hand: _Hand, stop: Stop) -> None:
    """What ``text2img.worker.job`` does with a worker, in its order."""
    database, selection = hand.database, Selection()
    run = Run(id=hand.name, started_at=datetime.now(UTC), host="simulated", status="running")
    waiting = database.queue.pending(selection)
    database.runs.save_run(run, _LEASE)
    deps = Dependencies(
        storage=Nowhere(), selection=selection, batch_size=shift.batch, limit=shift.share, upload_workers=2
    )
    context = RunContext(
        run_id=run.id,
        worker=hand.name,
        database=with_retries(database, _PATIENCE, stop.wait),
        leases=Leases(database.queue, _LEASE, lambda: database.runs.save_run(run, _LEASE)),
        watchdog=Watchdog(stop, _PATIENCE, lambda _: None),
        progress=NullProgress(),
        stop=stop,
        recorded=lambda _: None,
        waiting=waiting,
        notify=True,
    )
    Worker(deps, context, hand.engine, hand.engine.inspect(), [_WISHES]).run()
    collect(database.outbox, run.id, "completed", final=True)
