"""How a run ends when what it needs fails: by which status, what it waits for, and what is kept of it."""

from __future__ import annotations

import os
import threading
from dataclasses import replace

import pytest

from text2img.concurrency.signals import Stop
from text2img.databases import Collections, NewPrompt, Selection, open_database
from text2img.errors import Stopped, StorageFailed
from text2img.prompts import PromptId, RequestedParameters
from text2img.settings.loader import load
from text2img.telemetry.progress import NullProgress
from text2img.worker.build import build
from text2img.worker.job import Job, LocalExecutor
from text2img.worker.watchdog import Watchdog


@pytest.fixture
def database(tmp_path):
    """A real database with one prompt."""
    made = open_database(f"sqlite:///{tmp_path}/prompts.db", Collections())
    made.runs.enqueue([NewPrompt(id=PromptId("int", "1"), text="a cat", requested=RequestedParameters())])
    yield made
    made.close()


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Those of a run on it."""
    monkeypatch.chdir(tmp_path)
    flags = {"database": "sqlite:///prompts.db", "output": "pictures", "run_id": "night"}
    return load(flags, environment=False)


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Sets how long a run waits at its end, in seconds: long, where a test does not expect it to wait."""

    def limit(name, seconds):
        monkeypatch.setattr(f"text2img.worker.job.{name}", seconds)

    for name in ("_SHUTDOWN_TIMEOUT", "_RELEASE_TIMEOUT", "_SAVE_TIMEOUT"):
        limit(name, 60)
    return limit


class Failing:
    """A storage that refuses; ``first`` is called before."""

    def __init__(self, first):
        self.first = first

    def check(self):
        self.first()
        raise StorageFailed("the network is gone")


class Stuck:
    """A part of a database of which one method never returns once ``stuck`` is set."""

    def __init__(self, part, method):
        self._part, self._method = part, method
        self.stuck, self.end = threading.Event(), threading.Event()

    def __getattr__(self, name):
        if name == self._method and self.stuck.is_set():
            return lambda *_: self.end.wait()
        return getattr(self._part, name)


def failing(settings, database, storage, stop):
    deps = replace(build(settings, stop.wait), storage=storage)
    return Job(settings, deps, database, executor=LocalExecutor(settings, deps), stop=stop)


def run(job, stop):
    with Watchdog(stop, 300, lambda status: None) as watchdog:
        job.execute(NullProgress(), watchdog)


def test_what_fails_during_a_stop_does_not_change_its_status(database, settings):
    """A storage that fails while the run is being stopped leaves it stopped, by that signal."""
    stop = Stop()
    job = failing(settings, database, Failing(lambda: stop.set(15)), stop)
    with pytest.raises(Stopped) as stopped:
        run(job, stop)
    assert stopped.value.exit_status == 143
    assert [each.status for each in database.runs.last_runs(1)] == ["stopped"]


def test_a_database_that_hangs_does_not_hold_up_a_failed_run(database, settings, caplog, limits):
    """What has failed ends as that failure, though its end cannot be written down."""
    limits("_SHUTDOWN_TIMEOUT", 0.1)
    stuck, stop = Stuck(database.runs, "save_run"), Stop()
    job = failing(settings, replace(database, runs=stuck), Failing(stuck.stuck.set), stop)
    try:
        with pytest.raises(StorageFailed):
            run(job, stop)
    finally:
        stuck.end.set()
    assert "the run's end could not be recorded" in caplog.text


def test_giving_up_writes_down_the_end_though_the_claims_cannot_be_released(
    database, settings, monkeypatch, limits
):
    """A release that hangs is waited for no longer than its limit, and the run's document still says how it
    ended.
    """
    limits("_RELEASE_TIMEOUT", 0.1)
    monkeypatch.setattr("text2img.worker.leases._RELEASE_TIMEOUT", 600)
    stuck, statuses = Stuck(database.queue, "release"), []
    monkeypatch.setattr(os, "_exit", statuses.append)
    job = failing(settings, replace(database, queue=stuck), Failing(lambda: None), Stop())
    job._leases.hold(prompt.claim for prompt in database.queue.claim("w1", 1, 60, Selection()))
    stuck.stuck.set()
    try:
        job.force_exit(143)
    finally:
        stuck.end.set()
    assert statuses == [143]
    assert [each.status for each in database.runs.last_runs(1)] == ["stopped"]


def test_giving_up_does_not_belie_a_run_that_was_completed(database, settings, monkeypatch):
    """Asked to end while it is telling, with all its work done and written down, a run stays completed."""
    database.queue.claim("w1", 1, 600, Selection())
    monkeypatch.setattr(os, "_exit", lambda status: None)
    stop = Stop()
    job = failing(settings, database, Failing(lambda: None), stop)
    run(job, stop)
    job.force_exit(143)
    assert [each.status for each in database.runs.last_runs(1)] == ["completed"]
