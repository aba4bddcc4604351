"""The hand-over between threads: bounded, in order, and no failure lost."""

from __future__ import annotations

import threading

import pytest

from tests.clock import Clock
from tests.threads import waiting_in
from tests.waiting import until
from text2img.concurrency.signals import Stop
from text2img.concurrency.stages import BatchPrefetcher, Stage, StageTimer, WriteBuffer
from text2img.errors import Stopped, StorageFailed

HANG = 300  # seconds until a test gives up


def test_a_stage_works_on_everything_before_it_is_left() -> None:
    """Leaving the block waits for all that was put."""
    done: list[int] = []
    with Stage("test", done.append, threads=2, capacity=1) as stage:
        for number in range(100):
            stage.put(number)
    assert sorted(done) == list(range(100))


def test_a_stage_is_bounded() -> None:
    """With one thread at work and room for one, a third item has to wait."""
    working, may_end, third_is_in = threading.Event(), threading.Event(), threading.Event()

    def work(number: int) -> None:
        working.set()
        may_end.wait(HANG)

    def put_third(stage: Stage[int]) -> None:
        stage.put(3)
        third_is_in.set()

    with Stage("test", work, threads=1, capacity=1) as stage:
        stage.put(1)
        assert working.wait(HANG)
        stage.put(2)
        threading.Thread(target=put_third, args=(stage,)).start()
        try:
            until(lambda: third_is_in.is_set() or waiting_in(Stage.put))
            assert not third_is_in.is_set()
        finally:
            may_end.set()
        assert third_is_in.wait(HANG)


def test_a_stages_failure_reaches_who_puts_next() -> None:
    """The first failure is raised by a later put or on leaving; what waits then is not worked on."""
    failure, done = StorageFailed("no bucket"), []

    def work(number: int) -> None:
        if number == 0:
            raise failure
        done.append(number)

    with pytest.raises(StorageFailed) as raised, Stage("test", work, threads=1, capacity=1) as stage:
        for number in range(1000):
            stage.put(number)
    assert raised.value is failure
    assert done == []


def test_a_stage_finishes_what_it_has_when_the_flow_fails() -> None:
    """An exception in the block does not throw away what was handed over before it."""
    done: list[int] = []
    with pytest.raises(Stopped), Stage("test", done.append, threads=1, capacity=5) as stage:
        stage.put(1)
        stage.put(2)
        raise Stopped(15)
    assert done == [1, 2]


def test_ahead_makes_no_more_than_there_is_room_for() -> None:
    """While one item is being used, at most ``capacity`` others are made."""
    made: list[int] = []
    second = threading.Event()

    def items():
        for number in range(100):
            made.append(number)
            if number == 1:
                second.set()
            yield number

    with BatchPrefetcher(items(), capacity=1) as ahead:
        taken = next(iter(ahead))
        assert second.wait(HANG)
        assert (taken, len(made)) == (0, 2)
    assert len(made) <= 3


def test_ahead_raises_what_its_items_raise() -> None:
    """A failure while working ahead comes out where the items are taken, after those made before it."""

    def items():
        yield 1
        raise StorageFailed("gone")

    taken = []
    with pytest.raises(StorageFailed), BatchPrefetcher(items(), capacity=3) as ahead:
        taken.extend(ahead)
    assert taken == [1]


def test_a_stop_wakes_who_waits() -> None:
    """A wait ends as soon as a signal asks the run to end."""
    stop = Stop()

    def ask() -> None:
        until(lambda: waiting_in(Stop.wait))
        stop.set(15)

    threading.Thread(target=ask).start()
    with pytest.raises(Stopped) as stopped:
        stop.wait(10 * HANG)
    assert stopped.value.exit_status == 143


def test_the_stopwatch_adds_up_by_stage() -> None:
    """Time is added to its stage, also when the stage fails."""
    clock = Clock()
    watch = StageTimer(clock=clock)
    with pytest.raises(StorageFailed), watch("upload"):
        clock.advance(2)
        raise StorageFailed("gone")
    clock.advance(60)
    with watch("upload"), watch("encode"):
        clock.advance(3)
    assert watch.seconds() == {"upload": 5, "encode": 3}


def test_what_gathers_is_worked_on_together() -> None:
    """While the work goes on, more gathers, and is then taken all at once; nothing is left behind."""
    first_is_in, may_end, done = threading.Event(), threading.Event(), []

    def work(items: list[int]) -> None:
        done.append(items)
        first_is_in.set()
        may_end.wait(HANG)

    with WriteBuffer(work, threads=1, batch_size=lambda: 3, max_delay=HANG) as gather:
        gather.put([1, 2, 3])
        assert first_is_in.wait(HANG)
        gather.put([4])
        gather.put([5, 6])
        may_end.set()
    assert done == [[1, 2, 3], [4, 5, 6]]


def test_too_few_are_worked_on_when_the_first_has_waited_long_enough() -> None:
    """A single item does not wait for company for ever."""
    worked = threading.Event()
    with WriteBuffer(lambda _: worked.set(), threads=1, batch_size=lambda: 10, max_delay=0.05) as gather:
        gather.put([1])
        assert worked.wait(HANG)


def test_leaving_works_on_what_has_gathered() -> None:
    """Also when the block failed, what is too few is worked on at once."""
    done: list[int] = []
    with (
        pytest.raises(Stopped),
        WriteBuffer(done.extend, threads=1, batch_size=lambda: 10, max_delay=10 * HANG) as gather,
    ):
        gather.put([1, 2])
        raise Stopped(15)
    assert done == [1, 2]


def test_gathering_is_bounded() -> None:
    """With enough waiting already, whoever puts more waits until they are taken."""
    taken, may_end, third_is_in = threading.Event(), threading.Event(), threading.Event()

    def work(items: list[int]) -> None:
        taken.set()
        may_end.wait(HANG)

    def put(gather: WriteBuffer[int]) -> None:
        gather.put([3])
        third_is_in.set()

    with WriteBuffer(work, threads=1, batch_size=lambda: 1, max_delay=0) as gather:
        gather.put([1])
        assert taken.wait(HANG)
        gather.put([2])
        threading.Thread(target=put, args=(gather,)).start()
        try:
            until(lambda: third_is_in.is_set() or waiting_in(WriteBuffer.put))
            assert not third_is_in.is_set()
        finally:
            may_end.set()
        assert third_is_in.wait(HANG)


def test_one_that_hangs_does_not_hold_up_the_others() -> None:
    """With two threads, what gathers while one of them is stuck is worked on by the other."""
    may_end, both, done = threading.Event(), threading.Event(), []

    def work(items: list[int]) -> None:
        if items == [1]:
            may_end.wait(HANG)
        done.extend(items)
        if len(done) == 2:
            both.set()

    with WriteBuffer(work, threads=2, batch_size=lambda: 1, max_delay=0) as gather:
        for number in (1, 2, 3):
            gather.put([number])
        assert both.wait(HANG)
        assert done == [2, 3]
        may_end.set()
    assert done == [2, 3, 1]


def test_a_failure_of_what_gathers_reaches_who_puts_next() -> None:
    """It is raised by a later put, or on leaving, as the exception that it was."""
    failure = StorageFailed("no database")

    def work(items: list[int]) -> None:
        raise failure

    with (
        pytest.raises(StorageFailed) as raised,
        WriteBuffer(work, threads=1, batch_size=lambda: 1, max_delay=0) as gather,
    ):
        for number in range(1000):
            gather.put([number])
    assert raised.value is failure


def test_the_stopwatch_tells_how_long_items_take_to_come() -> None:
    """All items come through, and the time that they took stands under the stage's name."""
    clock = Clock()
    watch = StageTimer(clock=clock)

    def items():
        for number in (1, 2, 3):
            clock.advance(number)
            yield number

    taken = []
    for number in watch.iterate("wait", items()):
        clock.advance(60)
        taken.append(number)
    assert (taken, watch.seconds()) == ([1, 2, 3], {"wait": 6})
