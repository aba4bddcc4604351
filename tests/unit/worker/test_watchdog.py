"""The watchdog: what it calls a hang, and what it leaves alone."""

from __future__ import annotations

import signal
import threading

import pytest

from tests.clock import Clock, Turns
from tests.waiting import until
from text2img.concurrency.signals import Stop, exit_on_signal
from text2img.worker.watchdog import Watchdog, stacks


class Given:
    """Remembers with which status the run was given up."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.up = threading.Event()

    def __call__(self, status: int) -> None:
        self.status = status
        self.up.set()


def test_a_device_without_a_step_is_given_up(caplog) -> None:
    """No step for the stall timeout: every thread's stack goes to the log and the run ends with status 1."""
    given, clock = Given(), Clock()
    turns = Turns(clock)
    with Watchdog(Stop(), 4, given, clock=clock, wait=turns) as watchdog, watchdog.watch():
        turns.grant(8)  # of half a second each
        assert given.status is None
        turns.let_go()
        given.up.wait()
    assert clock.pauses == [0.5] * 9
    assert given.status == 1
    assert "no step for 4 s" in caplog.text
    assert "test_a_device_without_a_step" in caplog.records[-1].stack_trace


def test_a_device_that_makes_steps_is_left_alone() -> None:
    """Steps that keep coming are no hang, however long they take altogether; nor is a device at rest."""
    given, clock = Given(), Clock()
    turns = Turns(clock)
    with Watchdog(Stop(), 1, given, clock=clock, wait=turns) as watchdog:
        with watchdog.watch():
            for _ in range(5):
                turns.grant(4)  # of a quarter of the second each
                watchdog.heartbeat()
        turns.grant(8)
    assert (given.status, sum(clock.pauses)) == (None, 7)


@pytest.mark.parametrize("ends", [False, True])
def test_a_run_that_was_asked_to_end_has_the_grace_period_for_it(caplog, ends) -> None:
    """Whatever is still under way after it is given up, with the signal's status and a line that says so;
    a run that ends by itself in the meantime is left alone.
    """
    given, clock, stop, waited = Given(), Clock(), Stop(), threading.Event()

    def wait(over, seconds):
        clock.advance(seconds)
        if seconds != 5:
            return over.is_set()
        waited.set()
        return over.wait() if ends else over.is_set()

    stop.set(15)
    with Watchdog(stop, 300, given, 5, clock=clock, wait=wait):
        waited.wait()
        if not ends:
            given.up.wait()
    until(lambda: "watchdog" not in {thread.name for thread in threading.enumerate()})
    assert clock.pauses == [0.5, 5]
    assert given.status == (None if ends else 143)
    assert ("shutdown grace period (5 s) exceeded" in caplog.text) is not ends


def test_stacks_name_every_thread() -> None:
    """The stacks show where threads other than the caller's are."""
    here, leave = threading.Event(), threading.Event()

    def waits_in_here() -> None:
        here.set()
        leave.wait()

    thread = threading.Thread(target=waits_in_here)
    thread.start()
    here.wait()
    assert "waits_in_here" in stacks()
    leave.set()
    thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_counts_though_the_interrupted_code_stumbles(number) -> None:
    """Whoever is interrupted may raise something else on the way out; the status stays the signal's, and
    afterwards the signals mean what they meant before.
    """
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left, exit_on_signal():
        try:
            signal.raise_signal(number)
        finally:
            raise RuntimeError("cannot release a lock that is not held")
    assert left.value.code == 128 + number
    assert signal.getsignal(number) is before
