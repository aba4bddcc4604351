"""The named points at which a worker is killed, and how each is recognised from outside."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from tests.chaos.gates import command_of
from tests.chaos.triggers import Sight, holding
from tests.chaos.workers import BATCH, PER_IMAGE, Worker, pictures_made
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

_LONG_FOR_A_BATCH = 10 * PER_IMAGE * BATCH  # seconds


@dataclass(frozen=True)
class Fault:
    """``catch(site, nth, run_id)`` sets the catch. A run over three batches passes the point ``times``.

    ``lingers``: the device works there, on the ``nth`` batch, in the midst of which the worker may die.
    ``after_device``: how many times each batch passes the point, where it has left the device before.
    """

    name: str
    catch: Callable
    times: int
    lingers: bool = False
    after_device: int = 0

    def holds(self, nth):
        """What the device holds until the kill: the batch in the midst of which that comes, or the one behind
        the batch that gets to the point. So a slow kill costs no more than a fast one.
        """
        if self.after_device:
            return (nth - 1) // self.after_device + 2
        return nth if self.lingers else ""


def _in_database(recognises, *, reply):
    """A catch at the gate before MongoDB, of a command of that run's worker."""

    def catch(site, nth, run_id):
        def is_it(message):
            return recognises(command_of(message), run_id)

        return site.mongodb.catching(is_it, reply=reply, nth=nth)

    return catch


def _in_bucket(site, nth, run_id):
    return site.bucket.catching(lambda message: message.startswith(b"POST /upload/"), reply=True, nth=nth)


def _at_listener(site, nth, run_id):
    return site.listener.catching(run_id)


def _sets(field):
    """Recognises the update of prompts that sets this field."""

    def recognises(command, run_id):
        updates = command["updates"] if command.get("update") == "datasets" else []
        stages = [each["u"] if isinstance(each["u"], list) else [each["u"]] for each in updates]
        return any(field in stage.get("$set", {}) for stage in chain(*stages))

    return recognises


def _upserts_results(command, run_id):
    """Recognises the upsert of this run's results."""
    results = command["updates"] if command.get("update") == "dataset_records" else []
    return any(each["u"][0]["$set"]["run_id"] == {"$literal": run_id} for each in results)


def _gathers(command, run_id):
    """Recognises what marks this run's outcomes for its notice: other runs' were gathered at its start."""
    return _sets("untold")(command, run_id) and command["updates"][0]["q"].get("run_id") == run_id


def _in_file(event, each=1):
    """A catch within the transaction that brings the event about, a row for each prompt; of every ``each``
    rows it takes the first.
    """

    def catch(site, nth, run_id):
        return holding(site.file, event, (nth - 1) * each + 1)

    return catch


@contextmanager
def _seen_on_device(site, nth, run_id):
    """That this run has completed the batches before its ``nth``, and has that one on the device."""

    def is_there():
        prompts = site.documents("datasets")
        done = {each["_id"] for each in prompts if each["status"] == "completed" and each["run_id"] == run_id}
        return len(done | site.on_device()) >= nth * BATCH

    yield Sight(is_there)


BEFORE_THE_RESULT = Fault("before the result", _in_database(_upserts_results, reply=False), 3, after_device=1)
FAULTS = [
    Fault("after the claim", _in_database(_sets("claim_token"), reply=True), 3),
    Fault("in the middle of denoising", _in_database(_sets("started_claim"), reply=True), 3, lingers=True),
    Fault("after the upload, before the record", _in_bucket, 3 * BATCH, after_device=BATCH),
    BEFORE_THE_RESULT,
    Fault(
        "after the result, before the prompt is completed",
        _in_database(_sets("completed_at"), reply=False),
        3,
        after_device=1,
    ),
    Fault("after the record, before the notice", _in_database(_gathers, reply=False), 1),
    Fault("after the notice, before the callback's answer", _at_listener, 1),
]
_STARTED = "BEFORE UPDATE OF started_claim ON datasets WHEN NEW.started_claim IS NOT NULL"
_GATHERED = "BEFORE UPDATE OF untold ON datasets WHEN typeof(NEW.untold) = 'text'"
_OF_A_PROMPT = "WHEN NEW.run_id NOT LIKE 'text2img-check-%'"  # the trial of the results is not one
FILE_FAULTS = [
    Fault("after the claim, SQLite", _in_file(_STARTED, BATCH), 3),
    Fault("in the middle of denoising, SQLite", _seen_on_device, 3, lingers=True),
    Fault(
        "after the upload, before the record, SQLite",
        _in_file(f"BEFORE INSERT ON dataset_records {_OF_A_PROMPT}", BATCH),
        3,
        after_device=1,
    ),
    Fault(
        "after the result, before its transaction ends, SQLite",
        _in_file(f"AFTER INSERT ON dataset_records {_OF_A_PROMPT}"),
        3 * BATCH,
        after_device=BATCH,
    ),
    Fault("after the record, before the notice, SQLite", _in_file(_GATHERED), 1),
    Fault("after the notice, before the callback's answer, SQLite", _at_listener, 1),
]
"""In SQLite a batch's results and prompts change in one transaction: nothing stands between the two but a
kill in the midst of it, that must leave neither.
"""


def die(site, fault, run_id, nth=1, pause=0.0):
    """Start a worker and kill it at the ``nth`` time that it gets to the point, ``pause`` seconds later."""
    with fault.catch(site, nth, run_id) as catch, Worker(site, run_id, holds=fault.holds(nth)) as worker:
        worker.reaches(catch.reached.is_set)
        worker.lives_on(pause)
        worker.kill()


def finish(site, run_id="last", status=0, **how):
    """One more run, once the dead ones' leases are over; it must end with this status.

    ``how``: as Worker's. A notice whose sender died is leased for 30 seconds more, which are not waited for.
    """
    until(site.leases_over)
    site.end_leases("callbacks")
    with Worker(site, run_id, **how) as worker:
        assert worker.wait() == status, worker.text[-3000:]


POISON, NEIGHBOURS, AHEAD = 0, {1, 2, 3}, {4, 5, 6, 7}
"""One batch, and another that is claimed ahead of it."""
DEADLY = 5
"""Deaths, after which a prompt is abandoned."""
_OWN_GUIDANCE = 5.0  # so that no prompt of another batch joins these


def plant_poison(site, book):
    """A poisonous prompt that shares its batch with three others, and a batch that is claimed ahead.

    The device holds what it gets together with the poison: no worker gets away alive.
    """
    shared = [*book.prompts([POISON], "hold"), *book.prompts(NEIGHBOURS)]
    site.add([each | {"guidance_scale": _OWN_GUIDANCE} for each in shared])
    site.add(book.prompts(AHEAD))


def die_of_it(site, run_id):
    """A worker dies with the poison on its device; what else was there. Its lease is not waited for."""
    with Worker(site, run_id) as worker:
        there = worker.reaches(lambda: POISON in (seen := site.on_device()) and seen)
        worker.kill()
    site.end_leases("datasets", "runs")
    return there - {POISON}


def die_with_pictures_waiting(site, run_id):
    """A worker dies after the bucket has hung for so long that the device has nothing left to do."""
    with Worker(site, run_id, holds=1) as worker:
        worker.reaches(site.on_device)
        with site.bucket.away(silent=True):
            site.go()
            made = -1
            while made < (made := pictures_made(site)) or not made:
                worker.lives_on(_LONG_FOR_A_BATCH)
            worker.kill()


def _successor(site, condition, tries=3):
    """Another run that has got there, once the leases are over.

    SecantusDB has been seen to stall on an update for half a minute. If that was the sleeper's last sign of
    life, its leases live again for a moment, and a run that starts just then rightly finds nothing to do.
    """
    until(site.leases_over)
    worker = Worker(site, "other")
    try:
        worker.reaches(condition)
    except AssertionError:
        if tries == 1 or worker.lives:
            raise
        return _successor(site, condition, tries - 1)
    return worker


def sleep_through_the_lease(site):
    """Freeze a worker with one batch on the device and the results of another on their way to the database;
    let another run claim and make all of it, and the late results arrive before its own; let it end, and
    the sleeper wake. The sleeper's log.
    """
    with (
        BEFORE_THE_RESULT.catch(site, 1, "sleeper") as late,
        BEFORE_THE_RESULT.catch(site, 1, "other") as unfinished,
        Worker(site, "sleeper", holds=2) as sleeper,
    ):
        sleeper.reaches(late.reached.is_set)
        sleeper.reaches(lambda: site.on_device() == set(range(BATCH, 2 * BATCH)))
        sleeper.freeze()
        with _successor(site, unfinished.reached.is_set) as other:
            late.let_go(through=True)
            until(late.answered.is_set)
            unfinished.let_go(through=True)
            assert other.wait() == 0, other.text[-3000:]
        site.go()
        sleeper.thaw()
        assert sleeper.wait() == 0, sleeper.text[-3000:]
        return sleeper.text
