"""Workers as they are, on devices that sleep: a process carries several, each with a database of its own.

What works is ``text2img.worker.Worker`` with its claims ahead, marks, leases, encoding and records, and what
is told is gathered. Not there: a model, a picture worth encoding, a storage, a receiver, another machine.
"""

from __future__ import annotations

import threading
import time
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from benchmarks.fleet.watch import Log, count_commands, together, watched
from benchmarks.stub import StubEngine
from text2img.callbacks.telling import gather
from text2img.databases import Run, Selection
from text2img.databases.patient import patient
from text2img.guard import Guard
from text2img.leases import Leases
from text2img.progress import Silent
from text2img.prompts import Wishes
from text2img.stages import Stop, Stopwatch
from text2img.tally import Tally
from text2img.worker import Parts, Plan, Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from text2img.databases import Database

_SIDE = 64  # pixels, the fewest that a prompt may ask for
_STEPS = 4
_WISHES = Wishes(num_inference_steps=_STEPS, guidance_scale=1.0, width=_SIDE, height=_SIDE)
_LEASE = 60.0
_PATIENCE = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """What each worker has to do: ``share`` prompts in batches of ``batch``, ``seconds`` a picture."""

    url: str
    share: int
    batch: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a process's workers came to. Moments are ``time.monotonic``'s, which a machine's processes share.

    ``pictures`` is how many the devices made, ``cpu`` the process's processor seconds.
    """

    begun: float
    ended: float
    cpu: float
    pictures: int
    log: Log


class Nowhere:
    """A storage that keeps nothing and takes no time; see ImageStorage."""

    def check(self) -> None:
        """Nothing; see ImageStorage."""

    def try_write(self) -> None:
        """Nothing; see ImageStorage."""

    def put(self, name: str, data: bytes, content_type: str, may_replace: Callable[[], bool]) -> str:
        """The URL that it would have; see ImageStorage."""
        del data, content_type, may_replace
        return f"gs://nowhere/generated/{name}"


def carry(shift: Shift, workers: range, ready: Callable[[], object]) -> Done:
    """Let these workers do their shares, all at once, from when every process is ready."""
    commands, logs = Log(), [Log() for _ in workers]
    count_commands(commands)
    databases = [watched(shift.url, log) for log in logs]
    engines = [StubEngine(_SIDE, shift.seconds, _STEPS) for _ in workers]
    failures: list[BaseException] = []
    ready()
    for log in (commands, *logs):  # what opening took is no worker's work
        log.forget()
    begun, cpu = time.monotonic(), time.process_time()
    threads = [
        threading.Thread(target=_work, args=(shift, f"worker-{number}", database, engine, failures))
        for number, database, engine in zip(workers, databases, engines, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended, cpu = time.monotonic(), time.process_time() - cpu
    if failures:
        raise failures[0]
    pictures = sum(engine.made for engine in engines)
    return Done(begun=begun, ended=ended, cpu=cpu, pictures=pictures, log=together([commands, *logs]))


def _work(
    shift: Shift, name: str, database: Database, engine: StubEngine, failures: list[BaseException]
) -> None:
    try:
        with closing(database):
            _run(shift, name, database, engine)
    except BaseException as exc:  # noqa: BLE001 - it comes out where the process's workers are waited for
        failures.append(exc)


def _run(shift: Shift, name: str, database: Database, engine: StubEngine) -> None:
    """One run, in the order in which ``text2img.cli.job`` carries it out."""
    selection, stop = Selection(), Stop()
    run = Run(id=name, started_at=datetime.now(UTC), host="simulated", status="running")
    waiting = database.pending(selection)
    database.save_run(run, _LEASE)
    parts = Parts(
        database=patient(database, _PATIENCE, stop.wait),
        storage=Nowhere(),
        engine=engine,
        card=engine.inspect(),
        leases=Leases(database, _LEASE, lambda: database.save_run(run, _LEASE)),
        guard=Guard(stop, _PATIENCE, lambda _: None),
        progress=Silent(),
        seconds=Stopwatch(),
        recorded=lambda _: None,
    )
    plan = Plan(
        run_id=name,
        worker=name,
        selection=selection,
        wishes=[_WISHES],
        batch_size=shift.batch,
        waiting=waiting,
        limit=shift.share,
        upload_workers=2,
        tell=True,
    )
    Worker(parts, plan, stop, Tally()).run()
    gather(database, name, "completed", final=True)
