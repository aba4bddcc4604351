"""The fleet benchmark, in short: simulated workers on one database, and plain processes side by side."""

from __future__ import annotations

import json
import threading
from contextlib import closing

import pytest

from benchmarks.fleet import __main__ as fleet
from benchmarks.fleet.crew import Done, Shift, carry
from benchmarks.fleet.processes import pace
from benchmarks.fleet.sizes import document_sizes
from benchmarks.fleet.trial import Trial, attempt, fresh_databases
from benchmarks.fleet.watch import Log, watched
from benchmarks.places import add_prompts
from benchmarks.results import report
from tests.waiting import until
from text2img.databases import Collections, Selection, open_database


@pytest.fixture(scope="module")
def databases():
    """What gives the URL of an empty database of a kind; one server for all of them."""
    with fresh_databases("sqlite") as sqlite, fresh_databases("mongodb") as mongodb:
        yield {"sqlite": sqlite, "mongodb": mongodb}


@pytest.mark.parametrize("kind", ["sqlite", "mongodb"])
def test_workers_share_the_prompts_of_one_database(databases, kind):
    """Three workers make every prompt once, each its share; what they asked of the database is seen, and so
    are the lock of a file and the commands of a server.
    """
    shift = Shift(url=databases[kind](), share=8, batch=4, seconds=0.01, ramp=0.1, limit=250)
    trial = attempt(kind, 3, shift)
    assert (trial.recorded, trial.twice, trial.lost) == (24, 0, 0)
    assert len(set(trial.log.claimed)) == 24
    assert 0 < trial.busy < 1
    seen = fleet.row(trial)
    assert seen["prompts/s"] == pytest.approx(24 / trial.seconds)
    assert 0 < seen["claim ms p50"] <= seen["p99"]
    in_file = kind == "sqlite"
    assert (seen["lock ms a prompt"] > 0, seen["commands a prompt"] > 0.5) == (in_file, not in_file)
    assert (trial.server_cpu or 0) > 0 or in_file


def test_documents_grow_as_they_are_worked_on(databases):
    """A completed prompt is larger than a waiting one, which holds its text; all four kinds are weighed."""
    sizes = document_sizes(databases["mongodb"](), 20)
    assert 80 < sizes["waiting"] < sizes["completed"] < 2000
    assert min(sizes["result"], sizes["outcome in a notice"]) > 80


def test_what_goes_to_two_workers_is_counted(tmp_path):
    """A prompt whose lease is over goes to a second worker by a claim of another number: that is again.
    The same claim for two, or a picture more than there were claims, is twice.
    """
    url, log = f"sqlite:///{tmp_path}/prompts.db", Log()
    add_prompts(url, 1)
    with closing(watched(url, log)) as database:
        for worker in ("a", "b"):
            assert database.queue.claim(worker, 1, -1.0, Selection())
    assert (_trial(log, pictures=2).twice, _trial(log, pictures=2).again) == (0, 1)
    assert _trial(log, pictures=3).twice == 1
    log.claimed.append(log.claimed[0])
    assert (_trial(log, pictures=3).twice, _trial(log, pictures=3).again) == (1, 1)


def _trial(log, pictures, seconds=0.1, limit=60, **more):
    """A trial in which a process worked for a second."""
    done = Done(begun=0.0, ended=1.0, worked=1.0, cpu=0.0, pictures=pictures, log=log)
    shift = Shift(url="", share=1, batch=1, seconds=seconds, ramp=0.1, limit=limit)
    given = {"database": "sqlite", "workers": 1, "server_cpu": None, "recorded": 1, **more}
    return Trial(shift=shift, done=[done], **given)


def test_a_trial_that_takes_too_long_is_cut_short(databases):
    """After its limit the workers end as by a signal: what they held is free, and what was seen counts."""
    url, limits, released = databases["sqlite"](), [], threading.Event()
    add_prompts(url, 40)

    class AfterTheFirst(threading.Thread):
        """Comes true as soon as something is recorded, in place of the limit's seconds."""

        def __init__(self, limit, stop):
            super().__init__(daemon=True)
            limits.append(limit)
            self._stopping = stop

        def run(self):
            with closing(open_database(url, Collections())) as database:
                until(lambda: database.runs.counts(Selection()).completed)
            self._stopping()
            released.set()

        def cancel(self):
            released.wait()

    shift = Shift(url=url, share=20, batch=2, seconds=0.2, ramp=0.0, limit=0.5)
    done = carry(shift, range(2), 2, lambda: None, AfterTheFirst)
    with closing(open_database(url, Collections())) as database:
        counts = database.runs.counts(Selection())
    assert limits == [0.5]
    assert 0 < counts.completed < 40
    assert (counts.completed + counts.pending, counts.processing) == (40, 0)
    assert 0 < done.pictures <= len(done.log.claimed)


def test_what_a_limit_cut_off_is_not_lost():
    """A prompt that nobody completed is lost, unless the trial was longer than its limit."""
    assert _trial(Log(), pictures=0, recorded=0).lost == 1
    assert _trial(Log(), pictures=0, recorded=0, limit=0.5).lost == 0


def test_a_device_that_need_not_wait_misses_the_target(tmp_path):
    """Devices that take no time are never busy: the figure says so, with status 1, and it is kept."""
    asked = fleet.parser().parse_args(["--workers", "2", "4", "--prompts", "0"])
    log = Log(took={"claim": [0.001, 0.003]}, claimed=[("a", 1), ("b", 1)])
    outcome = fleet.result(asked, [_trial(log, 2, 0.001, recorded=1, workers=2)], {}, None)
    said = report(outcome)
    assert "MISSED: prompts claimed or drawn twice, or lost, by up to 2 workers: 1" in said
    assert "MISSED: devices busy, 2 workers at 0.001 s a picture, SQLite" in said
    outcome = fleet.result(asked, [_trial(log, 2, 0.5, recorded=2, workers=2)], {"waiting": 90.0}, 3.7)
    assert outcome.status == 0
    kept = json.loads(outcome.save(tmp_path).read_text())
    assert [(each["workers"], each["busy"], each["claim ms p50"]) for each in kept["rows"]] == [(2, 1.0, 2.0)]
    assert kept["bytes a document"] == {"waiting": 90.0}
    assert [each["measured"] for each in kept["checks"]] == [0, 1.0, 3.7]


def test_more_workers_are_of_no_use_where_devices_wait():
    """Below a share of busy devices no more workers are tried; faster devices need ones that were kept up."""
    assert [fleet.is_worth_trying(busy, 1.0) for busy in (1.0, 0.85, 0.5)] == [True, True, False]
    assert [fleet.is_worth_trying(busy, 2.0) for busy in (1.0, 0.85, 0.5)] == [True, False, False]


def test_plain_processes_make_all_pictures_and_have_a_pace():
    """Two whole jobs on one database make each prompt once; else it would be an error."""
    assert pace(2, 8, 0.0) > 0
