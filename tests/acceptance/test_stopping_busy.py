"""A run that is asked to end while its device is in a call that no signal interrupts, or by its terminal."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
from contextlib import closing

import pytest

from tests.acceptance import product
from tests.acceptance.claims import any_runs
from tests.acceptance.product import sleeping
from tests.waiting import until
from text2img.databases import Collections, Selection, open_database

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))


@pytest.fixture(autouse=True)
def _hangup_not_ignored():
    """The runs take SIGHUP as a shell gives it to them, though these tests may run below nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
)
def test_a_call_into_c_does_not_hold_up_the_stop(tmp_path, number, status):
    """With the device's thread in C forever, a run ends after its grace period, with the signal's status and
    its prompts pending, without a death counted.
    """
    product.add(tmp_path, {"id": 1, "text": "block"}, {"id": 2, "text": product.SCENE})
    with sleeping.running(*JOB, "--batch-size", "1", folder=tmp_path) as process:
        until((tmp_path / "blocked").exists, ended=process.poll)
        process.send_signal(number)
        _, log = process.communicate(timeout=product.HANG)
    assert (process.returncode, product.GRACE_EXCEEDED in log) == (status, True)
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database:
        found = database.execute("SELECT status, coalesce(deaths, 0) FROM datasets").fetchall()
    assert found == [("pending", 0)] * 2


def test_a_call_into_c_that_returns_in_time_is_waited_for(tmp_path):
    """A run whose device's thread is in C for a moment ends by itself when it returns, within its grace
    period.
    """
    product.add(tmp_path, {"id": 1, "text": "block for 1"}, {"id": 2, "text": product.SCENE})
    with sleeping.running(*JOB, "--batch-size", "1", folder=tmp_path) as process:
        until((tmp_path / "blocked").exists, ended=process.poll)
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=product.HANG)
    assert (process.returncode, product.GRACE_EXCEEDED in log) == (143, False)
    assert product.counts(tmp_path) == {"pending": 2}


def test_a_second_signal_ends_a_busy_run_at_once(tmp_path):
    """Asked again, a run does not wait for its grace period, though its device's thread is in C."""
    product.add(tmp_path, "block")
    with sleeping.running(*JOB, folder=tmp_path) as process:
        until((tmp_path / "blocked").exists, ended=process.poll)

        def asked_again():
            process.send_signal(signal.SIGTERM)  # those of the same moment count as one
            return process.poll() is not None

        until(asked_again)
        said, log = process.communicate()
    assert (process.returncode, said, product.GRACE_EXCEEDED in log) == (143, "", False)


def test_a_call_that_holds_the_lock_ends_the_run_as_a_stall(tmp_path):
    """While a call holds the interpreter's lock no signal is heard and nothing can be released: the process
    ends after the stall timeout, with every thread's stack, and once its lease has expired its prompt has a
    death.
    """
    product.add(tmp_path, "block locked")
    job = (*JOB, "--stall-timeout", "1", "--lease-seconds", "1")
    with sleeping.running(*job, folder=tmp_path, LOCKED_MARGIN="1") as process:
        until((tmp_path / "blocked").exists, ended=process.poll)
        process.send_signal(signal.SIGTERM)
        said, log = process.communicate()
    assert (process.returncode, said) == (1, "")
    assert "in _block" in log
    until(lambda: not any_runs(tmp_path / "prompts.db"))
    with closing(open_database(f"sqlite:///{tmp_path}/prompts.db", Collections())) as database:
        assert [prompt.deaths for prompt in database.queue.peek(1, Selection())] == [1]


@pytest.mark.parametrize("times", [1, 2])
def test_a_terminal_that_closes_ends_the_run_in_good_order(tmp_path, times):
    """SIGHUP, also twice, means SIGTERM: status 143, and the prompt is pending again."""
    product.add(tmp_path, "hold")
    with sleeping.running(*JOB, folder=tmp_path) as process:
        assert any("loaded" in line for line in process.stderr)
        for _ in range(times):
            process.send_signal(signal.SIGHUP)
        said, log = process.communicate()
    assert (process.returncode, product.GRACE_EXCEEDED in log) == (143, False)
    assert said.startswith("completed 0, failed 0, remaining 1; ")
    assert product.counts(tmp_path) == {"pending": 1}


def test_nohup_is_respected(tmp_path):
    """A run that was started with SIGHUP ignored goes on when it comes, and completes."""
    product.add(tmp_path, "hold")
    with subprocess.Popen(
        ["/usr/bin/env", "nohup", *sleeping.command(*JOB)],
        cwd=tmp_path, env=product.environment(tmp_path), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert any("loaded" in line for line in process.stderr)
        process.send_signal(signal.SIGHUP)
        (tmp_path / "release").touch()
        process.communicate()
    assert process.returncode == 0
    assert product.counts(tmp_path) == {"completed": 1}


def test_a_command_without_claims_ends_by_sighup(tmp_path):
    """A command that holds no claims ends with SIGTERM's status, too."""
    product.add(tmp_path, product.SCENE)
    with product.running("status", *JOB[:2], "--watch", "60", folder=tmp_path) as process:
        assert any("pending" in line for line in process.stdout)
        process.send_signal(signal.SIGHUP)
        process.communicate()
    assert process.returncode == 143
