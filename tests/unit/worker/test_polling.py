"""A server between its rounds: what ends its wait, and what ends the server."""

from __future__ import annotations

from functools import partial

import pytest

from tests.clock import Clock, Event
from tests.painter import Bench, Painter
from text2img.concurrency.signals import Stop
from text2img.databases import NewPrompt
from text2img.errors import BrokerFailed, Stopped
from text2img.prompts import PromptId, RequestedParameters
from text2img.worker.polling import PollingLoop


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
def clock():
    """Its clock."""
    return Clock()


@pytest.fixture
def arrived(clock):
    """What wakes it."""
    return Event(clock)


@pytest.fixture
def serve(stop, arrived, clock):
    """Makes servers that wait by the clock alone."""
    return partial(PollingLoop, stop, arrived, clock=clock)


def test_what_arrives_ends_the_wait_at_once(serve, arrived, clock):
    """With an hour between looks a server looks again as soon as it is told of something."""
    looks = Looks(3, arrived.set)
    assert serve(poll_seconds=3600).wait_for_work(looks, 0, None)
    assert (looks.count, clock.pauses) == (3, [])


def test_an_idle_server_ends(serve, clock):
    """After the seconds that were said without an outcome, and not before; an outcome begins them anew."""
    serving = serve(poll_seconds=2, idle_exit=30)
    for settled in (0, 1):
        began = clock.now
        assert not serving.wait_for_work(lambda: False, settled, None)
        assert clock.now == pytest.approx(began + 30)


def test_an_idle_server_looks_less_and_less_often(serve, clock):
    """In three seconds it looks four times: at once, after one, two and a half, and at the end."""
    looks = []
    assert not serve(poll_seconds=60, idle_exit=3).wait_for_work(lambda: looks.append(clock.now), 0, None)
    assert looks == pytest.approx([1000, 1001, 1002.5, 1003])


def test_a_retry_that_comes_due_is_looked_for(serve, clock):
    """A prompt that was put back is found when it can be claimed again, not at the next regular look."""
    looks = Looks(2)
    assert serve(poll_seconds=3600).wait_for_work(looks, 0, clock.now + 0.3)
    assert clock.now == pytest.approx(1000.3)


def test_a_round_that_came_to_nothing_is_not_repeated_at_once(serve, clock):
    """Where others are quicker to take what there is, a server does not ask without a pause."""
    serving = serve(poll_seconds=0.3)
    for _ in range(3):
        assert serving.wait_for_work(lambda: True, 0, None)
    assert sum(clock.pauses) == pytest.approx(0.6)


def test_a_stop_ends_the_wait(stop):
    """Asked to end, an idle server does so at its next glance, a tenth of a second later."""
    clock = Clock(lambda seconds: stop.set(15) if clock.now > 1007 else None)
    serving = PollingLoop(stop, Event(clock), poll_seconds=3600, clock=clock)
    with pytest.raises(Stopped):
        serving.wait_for_work(lambda: False, 0, None)
    assert max(clock.pauses) == 0.1
    assert 1007 < clock.now < 1007.2


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


def test_an_intake_that_has_ended_ends_the_server(serve):
    """It must not go on as if messages could still come."""
    intake = Broken()
    with (
        pytest.raises(BrokerFailed),
        serve(poll_seconds=3600, intake=intake) as serving,
    ):
        serving.wait_for_work(lambda: False, 0, None)
    assert intake.calls == ["start", "close"]


def test_a_server_goes_on_with_what_comes_later(tmp_path, stop, arrived, clock, caplog):
    """The engine is loaded once, and prompts that are added while nothing was left are made. Other programs'
    syntax is warned of once, before the server ends.
    """
    bench = Bench(tmp_path, 3)
    late = [
        NewPrompt(
            id=PromptId("str", f"late-{n}"), text="a {red|blue} cat", requested=RequestedParameters(seed=n)
        )
        for n in range(2)
    ]
    warned = []

    class Idle(PollingLoop):
        def wait_for_work(self, has_work, recorded, next_retry_at):
            warned.append(sum("syntax of other programs" in line for line in caplog.messages))
            if late:
                bench.database.runs.enqueue([late.pop()])
            return super().wait_for_work(has_work, recorded, next_retry_at)

    painter = Painter()
    loads = []
    painter.load = lambda: loads.append(1)
    bench.serving = Idle(stop, arrived, poll_seconds=5, idle_exit=60, clock=clock)
    bench.work(painter)
    assert bench.counts == (0, 0, 5, 0)
    assert len(painter.batches) == 3
    assert loads == [1]
    assert warned == [0, 1, 1]
    assert "1 prompt has syntax of other programs" in caplog.text
    bench.database.close()
