"""The flow with an engine that paints its seed: real database, real folder, and faults at chosen moments."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.clock import Clock, Turns, elapse
from tests.painter import Bench, Painter
from tests.threads import waiting_in
from tests.waiting import until
from text2img.concurrency.signals import Stop
from text2img.concurrency.stages import BatchPrefetcher, Stage
from text2img.databases import Selection
from text2img.engine import GeneratedImage
from text2img.errors import DeviceFailed, ErrorCode, ModelFailed, PromptFailed, Stopped, StorageFailed
from text2img.worker.finish import PostProcessor
from text2img.worker.leases import Leases


@pytest.fixture
def bench(tmp_path):
    """Ten prompts."""
    made = Bench(tmp_path, 10)
    yield made
    made.database.close()


def test_every_prompt_gets_its_own_picture(bench):
    """All prompts are made in batches of at most the batch size, each with the picture of its own seed."""
    painter = Painter()
    bench.work(painter)
    assert bench.counts == (0, 0, 10, 0)
    assert [bench.shade(str(n)) for n in range(10)] == list(range(10))
    assert [len(batch) for batch in painter.batches] == [4, 4, 2]


def test_one_prompts_failure_costs_its_neighbours_nothing(bench):
    """A prompt that the engine gives up ends in ``error``; those beside it complete."""

    def fault(request):
        if request.parameters.seed == 3:
            return PromptFailed(ErrorCode.NOT_FINITE, "the picture is not finite")
        return None

    bench.work(Painter(fault))
    assert bench.counts == (0, 0, 9, 1)
    assert bench.database.runs.counts(Selection()).errors == {"not_finite": 1}


def test_a_generation_that_failed_is_tried_again_by_the_same_run(bench):
    """``generation_failed`` goes back with a wait, the run waits for it, and the second try completes."""
    tries = []

    def fault(request):
        if request.parameters.seed == 5:
            tries.append(request.prompt.attempts)
            if len(tries) == 1:
                return PromptFailed(ErrorCode.GENERATION_FAILED, "RuntimeError: bad luck")
        return None

    clock = bench.hurry()
    bench.work(Painter(fault))
    assert tries == [0, 1]
    assert (bench.counts, bench.stats.postponed) == ((0, 0, 10, 0), 1)
    assert clock.pauses == [2]


def test_a_generation_that_always_fails_ends_in_error(bench):
    """After ``max_attempts`` tries a failing generation is an error with its sentence."""
    failed = PromptFailed(ErrorCode.GENERATION_FAILED, "RuntimeError: bad luck")
    painter = Painter(lambda request: failed if request.parameters.seed == 5 else None)
    clock = bench.hurry()
    bench.work(painter)
    assert bench.counts == (0, 0, 9, 1)
    assert sum("5" in batch for batch in painter.batches) == 2
    assert clock.pauses == [2]


def test_a_storage_that_refuses_everything_fails_the_run_and_no_prompt(bench):
    """StorageFailed ends the run; no prompt is marked as its fault, and all are pending at once."""

    class Refusing:
        def put(self, name, data, content_type, may_replace, classify):
            raise StorageFailed("403: no permission to create objects")

    bench.storage = Refusing()
    with pytest.raises(StorageFailed, match="no permission"):
        bench.work(Painter())
    assert bench.counts == (10, 0, 0, 0)


def test_an_object_that_is_refused_is_that_prompts_error(bench):
    """``storage_rejected`` for one object leaves the rest alone."""
    kept = bench.storage

    class Picky:
        def put(self, name, data, content_type, may_replace, classify):
            if name == "7.png":
                raise PromptFailed(ErrorCode.STORAGE_REJECTED, "400: no such name")
            return kept.put(name, data, content_type, may_replace, classify)

    bench.storage = Picky()
    bench.work(Painter())
    assert bench.counts == (0, 0, 9, 1)


def test_what_was_stored_is_recorded_though_the_storage_then_fails(bench):
    """Of a batch of which one upload fails the run, the pictures that were stored are recorded."""
    kept = bench.storage

    class Dying:
        def put(self, name, data, content_type, may_replace, classify):
            if name == "2.png":
                raise StorageFailed("the network is gone")
            return kept.put(name, data, content_type, may_replace, classify)

    bench.storage = Dying()
    with pytest.raises(StorageFailed):
        bench.work(Painter(), limit=4)
    assert bench.counts == (7, 0, 3, 0)


def test_a_stop_keeps_what_is_finished_and_gives_back_the_rest(bench):
    """Stopped in its second batch, a run records the first and releases all else, with no attempt counted."""

    def fault(request):
        if request.parameters.seed == 4:
            bench.stop.set(15)
            bench.stop.check()

    with pytest.raises(Stopped):
        bench.work(Painter(fault))
    assert bench.counts == (6, 0, 4, 0)
    assert {prompt.attempts for prompt in bench.database.queue.peek(10, Selection())} == {0}


def test_a_stop_ends_the_wait_for_a_retry(bench):
    """Stopped while it waits to try a prompt again, a run ends at once; the prompt is pending, for later."""
    failed = PromptFailed(ErrorCode.GENERATION_FAILED, "RuntimeError: bad luck")
    painter = Painter(lambda request: failed if request.parameters.seed == 5 else None)
    waited = []

    class Endless(Stop):
        def wait(self, seconds):
            waited.append(seconds)
            super().wait(3600)

    def ask():
        until(lambda: waiting_in(Stop.wait))
        bench.stop.set(15)

    bench.stop, bench.clock = Endless(), Clock()
    asker = threading.Thread(target=ask)
    asker.start()
    with pytest.raises(Stopped):
        bench.work(painter, max_attempts=9)
    asker.join()
    assert waited == [2]
    assert bench.counts == (1, 0, 9, 0)
    assert sum("5" in batch for batch in painter.batches) == 1


def test_a_worker_that_lost_its_claims_records_nothing(bench):
    """A prompt that another worker claimed meanwhile is left to that one."""

    def fault(request):
        if request.parameters.seed == 0:
            claims = [prompt.claim for prompt in taken]
            bench.database.queue.release(claims)
            bench.database.queue.claim("w2", 4, 60, Selection())

    taken: list = []
    first_claim = bench.database.queue.claim

    def claim(worker, *rest):
        prompts = first_claim(worker, *rest)
        if worker == "w1" and not taken:
            taken.extend(prompts)
        return prompts

    bench.database.queue.claim = claim
    bench.work(Painter(fault))
    assert bench.counts == (0, 4, 6, 0)
    assert bench.stats.completed == 6


def test_a_limit_is_kept(bench):
    """``limit`` is how many prompts a run takes, also when it is no multiple of the batch size."""
    bench.work(Painter(), limit=6)
    assert bench.counts == (4, 0, 6, 0)


def test_a_limit_is_kept_though_prompts_are_tried_again(bench):
    """The place of a prompt that was put back goes to no other while the run still claims: of ten prompts
    eight are ever touched, and all eight complete.
    """

    def fault(request):
        if request.parameters.seed == 1 and not request.prompt.attempts:
            return PromptFailed(ErrorCode.GENERATION_FAILED, "RuntimeError: bad luck")
        if request.parameters.seed == 3:  # others are still to be claimed
            until(lambda: bench.stats.postponed)
        return None

    painter = Painter(fault)
    bench.hurry()
    bench.work(painter, limit=8, batch_size=1)
    assert bench.counts == (2, 0, 8, 0)
    assert {prompt for batch in painter.batches for prompt in batch} == set("01234567")


def test_a_prompt_that_kills_its_workers_is_abandoned(tmp_path):
    """A prompt that was on the device when five workers died is given up without another try."""
    bench, selection = Bench(tmp_path, 1), Selection()
    for deaths in range(5):
        (prompt,) = bench.database.queue.claim("doomed", 1, 0, selection)
        assert prompt.deaths == deaths
        bench.database.queue.start([prompt.claim])
    painter = Painter()
    bench.work(painter)
    assert bench.database.runs.counts(selection).errors == {"abandoned": 1}
    assert painter.batches == []
    bench.database.close()


@pytest.mark.parametrize("work", ["warm_up", "generate"])
def test_a_prompt_that_kills_at_once_is_blamed_where_it_comes_first(bench, work):
    """When a run's first batch reaches the device, or is compiled for, it is written down already."""
    dead = []

    def killed(batch, _):
        claims = [request.prompt.claim for request in batch]
        bench.database.queue.extend(claims, 0)  # as if the worker had died and its lease had run out
        again = bench.database.queue.claim("next", 10, 60, Selection())
        dead.extend(prompt for prompt in again if prompt.id in {claim.id for claim in claims})
        raise DeviceFailed("killed")

    painter = Painter()
    setattr(painter, work, killed)
    with pytest.raises(DeviceFailed):
        bench.work(painter)
    assert [prompt.deaths for prompt in dead] == [1] * 4


def test_the_first_prompts_are_claimed_while_the_model_loads(bench):
    """The model is ready only after a claim: had the claim waited for it, the run would never begin."""
    painter = Painter()
    painter.load = lambda: until(lambda: bench.counts[1] > 0)
    bench.work(painter)
    assert bench.counts == (0, 0, 10, 0)


def test_a_model_that_cannot_be_loaded_costs_the_claimed_nothing(bench):
    """Should loading fail after the first claim, all is pending at once, with no attempt and no death."""

    def load():
        until(lambda: bench.counts[1] > 0)
        raise ModelFailed("the weights are torn")

    painter = Painter()
    painter.load = load
    with pytest.raises(ModelFailed, match="torn"):
        bench.work(painter)
    assert (bench.counts, painter.batches) == ((10, 0, 0, 0), [])
    assert {(prompt.attempts, prompt.deaths) for prompt in bench.database.queue.peek(10, Selection())} == {
        (0, 0)
    }


def test_a_stop_while_the_model_loads_gives_everything_back(bench):
    """Asked to end meanwhile, the run makes nothing once the model is there, and releases what it claimed."""

    def load():
        until(lambda: bench.counts[1] > 0)
        bench.stop.set(15)

    painter = Painter()
    painter.load = load
    with pytest.raises(Stopped):
        bench.work(painter)
    assert (bench.counts, painter.batches) == ((10, 0, 0, 0), [])


def test_claims_are_kept_alive_while_the_model_loads(bench):
    """A model that takes longer than the lease loses no prompt to another worker, and the run stays alive."""
    beats, turns = [], Turns(Clock(partial(elapse, bench.file)))

    def load():
        until(lambda: bench.counts[1] > 0)
        turns.grant(6)  # of a third of a lease each
        assert len(bench.database.queue.claim("w2", 10, 600, Selection())) == 6

    painter = Painter()
    painter.load = load
    bench.leases = lambda: Leases(bench.database.queue, 60, lambda: beats.append(1), wait=turns)
    bench.work(painter)
    assert bench.counts == (0, 6, 4, 0)
    assert len(beats) == 6


def test_the_engine_may_warm_up_before_each_batch(bench):
    """It is told what comes next and how many prompts are left, outside the device's watch."""
    asked: list[tuple[int, int]] = []
    painter = Painter()
    painter.warm_up = lambda batch, left: asked.append((len(batch), left))
    bench.work(painter)
    assert asked == [(4, 10), (4, 6), (2, 2)]


def test_small_batches_are_written_down_together(bench):
    """Batches of one are recorded several at a time, and every prompt still gets its outcome."""
    kept, sizes = bench.database.queue.record, []

    def record(outcomes, run_id, **options):
        sizes.append(len(outcomes))
        return kept(outcomes, run_id, **options)

    bench.database.queue.record = record
    with closing(sqlite3.connect(bench.file)) as rows, rows:
        rows.execute("UPDATE datasets SET num_inference_steps = _id + 1")
    bench.work(Painter())
    assert bench.counts == (0, 0, 10, 0)
    assert (sum(sizes), max(sizes) >= 4) == (10, True)
    assert len(sizes) < 10


def test_a_long_run_keeps_no_thread_and_no_connection_for_each_batch(tmp_path):
    """After 200 batches there are about as many open files and threads as after 20."""
    bench, painter, seen = Bench(tmp_path, 200), Painter(), []
    painter.warm_up = lambda batch, left: seen.append(
        (len(list(Path("/dev/fd").iterdir())), threading.active_count())
    )
    bench.work(painter, batch_size=1)
    bench.database.close()
    (files, threads), (later_files, later_threads) = seen[20], seen[-1]
    assert later_files <= files + 20  # uploads open files as they come and go
    assert later_threads <= threads + 20


def test_all_goes_on_while_the_device_works(bench):
    """While a batch is on the device, the one before is stored and recorded, the one after is claimed: each
    batch here stays there until both have happened.
    """

    def fault(request):
        made = sum(map(len, painter.batches)) - len(painter.batches[-1])
        until(lambda: bench.counts[2] >= made and bench.counts[1] >= min(8, 10 - made))

    painter = Painter(fault)
    bench.work(painter)
    assert bench.counts == (0, 0, 10, 0)


def test_a_storage_that_hangs_stops_the_device_in_the_end(tmp_path):
    """With no upload coming to an end, four batches are made, six are claimed at the most, and no more."""
    bench, end = Bench(tmp_path, 100), threading.Event()
    kept = bench.storage

    class Hanging:
        def put(self, *arguments):
            end.wait()
            return kept.put(*arguments)

    bench.storage, painter = Hanging(), Painter()
    work = threading.Thread(target=bench.work, args=(painter,), kwargs={"waiting": 0})
    work.start()
    try:
        until(lambda: len(painter.batches) >= 4 and bench.counts[1] >= 20)
        until(
            lambda: waiting_in(Stage.put) and waiting_in(BatchPrefetcher._produce)
        )  # the device, and what claims for it
        assert (len(painter.batches), bench.counts[1] <= 24, bench.counts[2]) == (4, True, 0)
    finally:
        end.set()
    work.join()
    assert bench.counts == (0, 0, 100, 0)
    bench.database.close()


def test_few_pictures_are_encoded_at_once(tmp_path):
    """Of sixteen that could be uploaded at once four are encoded at a time: the device needs the cores."""
    bench, pixels = Bench(tmp_path, 16), Watched.black()

    class Watching(Painter):
        def _paint(self, request):
            return GeneratedImage(pixels=pixels, scheduler="none")

    bench.work(Watching(), batch_size=16)
    assert bench.counts == (0, 0, 16, 0)
    assert pixels.most == 4
    bench.database.close()


class Watched(np.ndarray):
    """Pixels that know by how many threads they are read at once."""

    @classmethod
    def black(cls):
        pixels = np.zeros((64, 64, 3), np.uint8).view(cls)
        pixels.most, pixels.now, pixels.seen, pixels.lock = 0, 0, False, threading.Lock()
        return pixels

    @property
    def __array_interface__(self):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        until(
            lambda: self.seen or self.now + waiting_in(PostProcessor._encode) == 16
        )  # all that could come are here
        self.seen = True
        with self.lock:
            self.now -= 1
        return super().__array_interface__
