"""A server between its rounds: what ends its wait, and what ends the server."""

from __future__ import annotations

import threading
import time

import pytest

from tests.painter import Bench, Painter
from text2img.databases import NewPrompt
from text2img.errors import BrokerFailed, Stopped
from text2img.prompts import PromptId, Wishes
from text2img.serving import Serving
from text2img.stages import Stop

PATIENCE = 20  # seconds until a test gives up


class Looks:
    """Looks for work: those that find none, until the ``number``-th. ``looked`` is called at each."""

    def __init__(self, number, looked=lambda: None):
        self._number, self._looked, self.count = number, looked, 0

    def __call__(self):
        self.count += 1
        self._looked()
        return self.count >= self._number


@pytest.fixture
def stop():
    """Whether the server was asked to end."""
    return Stop()


@pytest.fixture
def arrived():
    """What wakes it."""
    return threading.Event()


def test_what_arrives_ends_the_wait_at_once(stop, arrived):
    """With an hour between looks a server looks again as soon as it is told of something."""
    looks = Looks(3, arrived.set)
    serving = Serving(stop, arrived, poll_seconds=3600)
    assert serving.another(looks, 0, None)
    assert looks.count == 3


def test_an_idle_server_ends(stop, arrived):
    """After the seconds that were said without an outcome, and not before; an outcome begins them anew."""
    serving = Serving(stop, arrived, poll_seconds=0.05, idle_exit=0.5)
    for settled in (0, 1):
        began = time.monotonic()
        assert not serving.another(lambda: False, settled, None)
        assert time.monotonic() - began >= 0.5


def test_an_idle_server_looks_less_and_less_often(stop, arrived):
    """In three seconds it looks four times at the most: after one, two and a half, and at the end."""
    looks = Looks(1000)
    assert not Serving(stop, arrived, poll_seconds=60, idle_exit=3).another(looks, 0, None)
    assert 2 <= looks.count <= 4


def test_a_retry_that_comes_due_is_looked_for(stop, arrived):
    """A prompt that was put back is found when it can be claimed again, not at the next regular look."""
    looks, began = Looks(2), time.monotonic()
    assert Serving(stop, arrived, poll_seconds=3600).another(looks, 0, began + 0.3)
    assert 0.3 <= time.monotonic() - began < 1


def test_a_round_that_came_to_nothing_is_not_repeated_at_once(stop, arrived):
    """Where others are quicker to take what there is, a server does not ask without a pause."""
    serving, began = Serving(stop, arrived, poll_seconds=0.3), time.monotonic()
    for _ in range(3):
        assert serving.another(lambda: True, 0, None)
    assert time.monotonic() - began >= 0.6


def test_a_stop_ends_the_wait(stop, arrived):
    """Asked to end, an idle server does so at once."""
    threading.Timer(0.2, stop.set, [15]).start()
    with pytest.raises(Stopped):
        Serving(stop, arrived, poll_seconds=3600).another(lambda: False, 0, None)


class Broken:
    """An intake that ends with an error of its own."""

    def __init__(self):
        self.calls = []

    def start(self):
        self.calls.append("start")

    def check(self):
        raise BrokerFailed("gone")

    def close(self):
        self.calls.append("close")


def test_an_intake_that_has_ended_ends_the_server(stop, arrived):
    """It must not go on as if messages could still come."""
    intake = Broken()
    with (
        pytest.raises(BrokerFailed),
        Serving(stop, arrived, poll_seconds=3600, intake=intake) as serving,
    ):
        serving.another(lambda: False, 0, None)
    assert intake.calls == ["start", "close"]


def test_a_server_goes_on_with_what_comes_later(tmp_path, stop, arrived):
    """The engine is loaded once, and prompts that are added while nothing was left are made."""
    bench = Bench(tmp_path, 3)
    late = [NewPrompt(id=PromptId("str", f"late-{n}"), text="a cat", wishes=Wishes(seed=n)) for n in range(2)]

    class Idle(Serving):
        def another(self, waits, settled, due):
            if late:
                bench.database.enqueue([late.pop()])
            return super().another(waits, settled, due)

    painter = Painter()
    loads = []
    painter.load = lambda: loads.append(1)
    bench.serving = Idle(stop, arrived, poll_seconds=0.05, idle_exit=0.1)
    bench.work(painter)
    assert bench.counts == (0, 0, 5, 0)
    assert len(painter.batches) == 3
    assert loads == [1]
    bench.database.close()
