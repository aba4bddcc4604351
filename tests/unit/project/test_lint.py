"""The checker of tests that depend on the machine's speed: what it refuses and what it lets through."""

from __future__ import annotations

import pytest

from tests.lint import docstrings
from tests.lint.clocks import findings


@pytest.mark.parametrize(
    "body",
    [
        "assert time.monotonic() - begun < 5",
        "assert 5 > perf_counter() - begun",
        "begun = time.time()\n    work()\n    assert time.time() - begun < 5",
        "begun = time.monotonic()\n    work()\n    took = time.monotonic() - begun\n    assert took < 5",
        "n, begun = 1, time.monotonic()\n    spent = time.monotonic() - begun\n    return spent < 5",
        "end = time.monotonic() + 5\n    while time.monotonic() < end:\n        work()",
        "moments.append(time.monotonic())\n    assert moments[1] - moments[0] > 1",
        "assert (moment := time.monotonic()) and moment - begun < 1",
        "assert abs(stamp - time.time()) < 10",
        "time.sleep(0.1)",
        "sleep(1)",
        "assert event.wait(2)",
        "process.wait(timeout=5)",
        "process.communicate(timeout=2.5)",
        "thread.join(0.5)",
    ],
)
def test_what_depends_on_the_machine_s_speed_is_refused(body):
    """Each way to compare elapsed time, to sleep, or to let a short limit decide, is found."""
    assert findings(f"def test_it():\n    {body}\n")


@pytest.mark.parametrize(
    "body",
    [
        "assert before <= time.time() <= after",
        "clock = Clock()\n    assert clock.now - begun < 5",
        "assert event.wait(60)",
        "assert event.wait()",
        "process.wait(timeout=HANG)",
        "', '.join(names)",
        "os.utime(path, (time.time() - 7200,) * 2)",
        "time.sleep(0.5)  # clock: the scripted server is slow",
        "# clock: the scripted server is slow\n    time.sleep(0.5)",
    ],
)
def test_what_holds_on_any_machine_passes(body):
    """Order, a clock of the test's own, a limit that only ends what hangs, and a reason given in place."""
    assert findings(f"def test_it():\n    {body}\n") == []


@pytest.mark.parametrize("text", ["Whether it is.", "Of a prompt.", "What it is.", "Work. Knows no file."])
def test_a_docstring_that_does_not_say_what_the_function_does_is_refused(text):
    """A clause in place of an imperative is found, and so is what the function does not know."""
    assert list(docstrings.findings(f'def work():\n    """{text}"""\n'))


@pytest.mark.parametrize("text", ["Return whether it is.", "Whole images are kept.", "Check a prompt."])
def test_a_plain_docstring_is_let_through(text):
    """An imperative, and a noun that only begins like a clause, are no findings."""
    assert not list(docstrings.findings(f'def work():\n    """{text}"""\n'))


def test_a_room_may_say_what_it_does_not_know():
    """The docstring of a package, and only that, may name what the room does not know."""
    source = '"""The domain. Knows no database."""\n'
    assert not list(docstrings.findings(source, room=True))
    assert list(docstrings.findings(source))
