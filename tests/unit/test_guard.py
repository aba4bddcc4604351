"""The guard: what it calls a hang, and what it leaves alone."""

from __future__ import annotations

import signal
import threading

import pytest

from text2img.guard import Guard, leaving, stacks
from text2img.stages import Stop

PATIENCE = 20  # seconds until a test gives up


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
    given = Given()
    with Guard(Stop(), 0.2, given) as guard, guard.watching():
        assert given.up.wait(PATIENCE)
    assert given.status == 1
    assert "no step for 0.2 s" in caplog.text
    assert "test_a_device_without_a_step" in caplog.text


def test_a_device_that_makes_steps_is_left_alone() -> None:
    """Steps that keep coming are no hang, however long they take altogether; nor is a device at rest."""
    given, pause = Given(), threading.Event()
    with Guard(Stop(), 0.5, given) as guard:
        with guard.watching():
            for _ in range(10):
                pause.wait(0.1)
                guard.pulse()
        pause.wait(1)
    assert given.status is None


def test_stacks_name_every_thread() -> None:
    """The stacks show where threads other than the caller's are."""
    here, leave = threading.Event(), threading.Event()

    def waits_in_here() -> None:
        here.set()
        leave.wait(PATIENCE)

    thread = threading.Thread(target=waits_in_here)
    thread.start()
    assert here.wait(PATIENCE)
    assert "waits_in_here" in stacks()
    leave.set()
    thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_counts_though_the_interrupted_code_stumbles(number) -> None:
    """Whoever is interrupted may raise something else on the way out; the status stays the signal's, and
    afterwards the signals mean what they meant before.
    """
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left, leaving():
        try:
            signal.raise_signal(number)
        finally:
            raise RuntimeError("cannot release a lock that is not held")
    assert left.value.code == 128 + number
    assert signal.getsignal(number) is before
