"""The fleet benchmark, in short: simulated workers on one database, and plain processes side by side."""

from __future__ import annotations

import json
from contextlib import closing

import pytest

from benchmarks.fleet import __main__ as fleet
from benchmarks.fleet.crew import Done, Shift
from benchmarks.fleet.processes import pace
from benchmarks.fleet.sizes import document_sizes
from benchmarks.fleet.trial import Trial, attempt, fresh_databases
from benchmarks.fleet.watch import Log, watched
from benchmarks.places import add_prompts
from text2img.databases import Selection


@pytest.mark.parametrize("kind", ["sqlite", "mongodb"])
def test_workers_share_the_prompts_of_one_database(kind):
    """Three workers make every prompt once, each its share; what they asked of the database is seen, and so
    are the lock of a file and the commands of a server.
    """
    with fresh_databases(kind) as fresh:
        shift = Shift(url=fresh(), share=20, batch=5, seconds=0.02, ramp=0.1, limit=60)
        trial = attempt(kind, 3, shift)
    assert (trial.recorded, trial.twice, trial.lost) == (60, 0, 0)
    assert len(set(trial.log.claimed)) == 60
    assert 0 < trial.busy < 1
    seen = fleet.row(trial)
    assert seen["prompts/s"] == pytest.approx(60 / trial.seconds)
    assert 0 < seen["claim ms p50"] <= seen["p99"]
    in_file = kind == "sqlite"
    assert (seen["lock ms a prompt"] > 0, seen["commands a prompt"] > 0.5) == (in_file, not in_file)
    assert (trial.server_cpu or 0) > 0 or in_file


def test_documents_grow_as_they_are_worked_on():
    """A completed prompt is larger than a waiting one, which holds its text; all four kinds are weighed."""
    with fresh_databases("mongodb") as fresh:
        sizes = document_sizes(fresh())
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
            assert database.claim(worker, 1, -1.0, Selection())
    assert (_trial(log, pictures=2).twice, _trial(log, pictures=2).again) == (0, 1)
    assert _trial(log, pictures=3).twice == 1
    log.claimed.append(log.claimed[0])
    assert (_trial(log, pictures=3).twice, _trial(log, pictures=3).again) == (1, 1)


def _trial(log, pictures):
    done = Done(begun=0.0, ended=1.0, worked=1.0, cpu=0.0, pictures=pictures, log=log)
    shift = Shift(url="", share=1, batch=1, seconds=0.1, ramp=0.1, limit=60)
    return Trial(database="sqlite", workers=1, shift=shift, done=[done], server_cpu=None, recorded=1)


def test_a_trial_that_takes_too_long_is_cut_short():
    """After its limit the workers end as by a signal: what they held is free, and what was seen counts."""
    with fresh_databases("sqlite") as fresh:
        shift = Shift(url=fresh(), share=200, batch=5, seconds=0.1, ramp=0.1, limit=2)
        trial = attempt("sqlite", 2, shift)
    assert (trial.twice, trial.lost) == (0, 0)
    assert 0 < trial.recorded < 400
    assert trial.busy <= 1


def test_a_device_that_need_not_wait_misses_the_target(tmp_path, capsys):
    """Devices that take no time are never busy: the figure says so, with status 1, and it is kept."""
    short = ["--workers", "2", "4", "--databases", "sqlite", "--share", "10", "--seconds", "0.001"]
    kept_at = ["--results", str(tmp_path), "--prompts", "0", "--faster"]
    assert fleet.main([*short, *kept_at]) == 1
    said = capsys.readouterr().out
    assert "reached: prompts claimed or drawn twice, or lost, by up to 2 workers: 0" in said
    assert "MISSED: devices busy, 2 workers at 0.001 s a picture, SQLite" in said
    kept = json.loads((tmp_path / "fleet.json").read_text())
    assert [each["workers"] for each in kept["rows"]] == [2]  # four would be of no use


def test_plain_processes_bring_what_they_are_worth():
    """Two jobs at once, each with a device that sleeps, are well over one and a half times as fast as one."""
    assert pace(2, 48, 0.1) > 1.5 * pace(1, 48, 0.1)
