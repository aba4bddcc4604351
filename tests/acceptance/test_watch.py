"""``status --watch``, as people keep it open beside a run."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import threading
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from urllib.parse import urlsplit

import pytest

from tests.acceptance import product
from tests.chaos.gates import Gate, wire_message
from tests.contract.database_suite import ALL, failed
from tests.outcomes import completed
from tests.waiting import until
from text2img.databases import Collections, NewPrompt, Run, open_database
from text2img.prompts import PromptId, RequestedParameters


class Screen:
    """What the command has shown so far."""

    def __init__(self, process, descriptor):
        self.process, self._descriptor, self._text = process, descriptor, ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while data := self._some():
            self._text += data.decode()

    def _some(self):
        try:
            return os.read(self._descriptor, 65536)
        except OSError:  # a terminal whose other end is gone
            return b""

    def shows(self, pattern, after=0):
        """Wait until it has shown this since that place; the place behind it."""
        found = until(lambda: re.compile(pattern).search(self._text, after), ended=self._has_ended)
        return found.end()

    def _has_ended(self):
        """What it has shown, once there will be no more of it."""
        return not self._reader.is_alive() and f"it had shown\n{self._text[-3000:]}"

    def ends(self, number):
        """Its exit status after that signal."""
        self.process.send_signal(number)
        return self.process.wait()


@contextmanager
def watching(folder, url, *, terminal=False):
    ours, theirs = pty.openpty() if terminal else os.pipe()
    with subprocess.Popen(
        product.command("status", "--database", url, "--watch", "0.2"),
        cwd=folder,
        env=product.environment(folder, TERM="xterm", COLUMNS="120"),
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    ) as process:
        os.close(theirs)
        try:
            yield Screen(process, ours)
        finally:
            process.kill()
            os.close(ours)


def filled(url, prompts):
    database = open_database(url, Collections())
    database.runs.enqueue(
        NewPrompt(id=PromptId("int", str(n)), text="a cat", requested=RequestedParameters())
        for n in range(prompts)
    )
    return closing(database)


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_it_follows_what_happens(tmp_path, terminal):
    """Counts, workers with their last sign of life, expired leases, failures by code, what is untold, pace
    and time left, as the database says them; Ctrl-C ends it with 130.
    """
    url = f"sqlite:///{tmp_path}/prompts.db"
    with filled(url, 20) as database, watching(tmp_path, url, terminal=terminal) as screen:
        place = screen.shows(r"pending +20 [\s\S]*undelivered +0 [\s\S]*pace +not known[\s\S]*no workers")
        database.queue.claim("dead-1-cd", 3, -90, ALL)
        mine = database.queue.claim("live-2-ab", 4, 60, ALL)
        run = {"worker": "live-2-ab", "host": "live"}
        database.runs.save_run(Run(id="night", started_at=datetime.now(UTC), **run), 60)
        place = screen.shows(r"processing +7  \(leases: 4 live, 3 expired\)", place)
        place = screen.shows(
            r"dead-1-cd  lease expired 2 min ago; 3 prompts claimed, 3 of their leases expired\s+"
            r"live-2-ab  last heartbeat \d s ago; 4 prompts claimed, run night",
            place,
        )
        three = tuple(f"gs://b/{n}.png" for n in range(3))
        done = [completed(mine[0], image_urls=three), completed(mine[1]), failed(mine[2])]
        database.queue.record(done, "night", notify=True)
        place = screen.shows(
            r"completed +2\s+error +1  \(safety 1\)\s+undelivered +3 [\s\S]*"
            r"pace +(?!0\.00)\d+\.\d\d images/s over the last \d+ s; about [\d]+ (s|min) left",
            place,
        )
        assert screen.ends(signal.SIGINT) == 130
    assert ("\x1b[1A" in screen._text) is terminal


def test_a_database_that_is_away_is_said_and_asked_again(tmp_path, mongodb_server):
    """While the database refuses, the last counts stay with a line that says so; then they follow again."""
    with Gate(urlsplit(mongodb_server).port, wire_message) as gate:
        direct, watched = (
            f"{mongodb_server}/watched",
            f"mongodb://127.0.0.1:{gate.port}/watched?directConnection=true",
        )
        with filled(direct, 2) as database, watching(tmp_path, watched) as screen:
            place = screen.shows(r"pending +2 ")
            with gate.away():
                place = screen.shows(r"the database is unavailable, retrying: .*\npending +2 ", place)
            database.queue.claim("w", 1, 60, ALL)
            screen.shows(r"\npending +1 [\s\S]*w  lease expires in", place)
            assert screen.ends(signal.SIGTERM) == 143


def test_a_watch_that_cannot_be_is_refused(tmp_path):
    """No pause, and a plot beside it: status 2, and a line that names the option."""
    wrong = [("--watch", "soon"), ("--watch", "0"), ("--watch", "--plot", "last")]
    status = ("status", "--database", "sqlite:///p.db")
    for refused in product.run_each([(*status, *arguments) for arguments in wrong], tmp_path):
        assert (refused.returncode, "--watch" in refused.stderr) == (2, True)
