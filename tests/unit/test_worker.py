"""The flow with an engine that paints its seed: real database, real folder, and faults at chosen moments."""

from __future__ import annotations

import pytest

from tests.painter import Bench, Painter
from text2img.databases import Selection
from text2img.errors import ErrorCode, PromptFailed, Stopped, StorageFailed


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
    assert bench.database.counts(Selection()).errors == {"not_finite": 1}


def test_a_generation_that_failed_is_tried_again_by_the_same_run(bench):
    """``generation_failed`` goes back with a wait, the run waits for it, and the second try completes."""
    tries = []

    def fault(request):
        if request.parameters.seed == 5:
            tries.append(request.prompt.attempts)
            if len(tries) == 1:
                return PromptFailed(ErrorCode.GENERATION_FAILED, "RuntimeError: bad luck")
        return None

    bench.work(Painter(fault))
    assert tries == [0, 1]
    assert (bench.counts, bench.tally.postponed) == ((0, 0, 10, 0), 1)


def test_a_generation_that_always_fails_ends_in_error(bench):
    """After ``max_attempts`` tries a failing generation is an error with its sentence."""
    failed = PromptFailed(ErrorCode.GENERATION_FAILED, "RuntimeError: bad luck")
    painter = Painter(lambda request: failed if request.parameters.seed == 5 else None)
    bench.work(painter)
    assert bench.counts == (0, 0, 9, 1)
    assert sum("5" in batch for batch in painter.batches) == 2


def test_a_storage_that_refuses_everything_fails_the_run_and_no_prompt(bench):
    """StorageFailed ends the run; no prompt is marked as its fault, and all are pending at once."""

    class Refusing:
        def put(self, name, data, content_type, may_replace):
            raise StorageFailed("403: no permission to create objects")

    bench.storage = Refusing()
    with pytest.raises(StorageFailed, match="no permission"):
        bench.work(Painter())
    assert bench.counts == (10, 0, 0, 0)


def test_an_object_that_is_refused_is_that_prompts_error(bench):
    """``storage_rejected`` for one object leaves the rest alone."""
    kept = bench.storage

    class Picky:
        def put(self, name, data, content_type, may_replace):
            if name == "7.png":
                raise PromptFailed(ErrorCode.STORAGE_REJECTED, "400: no such name")
            return kept.put(name, data, content_type, may_replace)

    bench.storage = Picky()
    bench.work(Painter())
    assert bench.counts == (0, 0, 9, 1)


def test_what_was_stored_is_recorded_though_the_storage_then_fails(bench):
    """Of a batch of which one upload fails the run, the pictures that were stored are recorded."""
    kept = bench.storage

    class Dying:
        def put(self, name, data, content_type, may_replace):
            if name == "2.png":
                raise StorageFailed("the network is gone")
            return kept.put(name, data, content_type, may_replace)

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
    assert {prompt.attempts for prompt in bench.database.peek(10, Selection())} == {0}


def test_a_worker_that_lost_its_claims_records_nothing(bench):
    """A prompt that another worker claimed meanwhile is left to that one."""

    def fault(request):
        if request.parameters.seed == 0:
            claims = [prompt.claim for prompt in taken]
            bench.database.release(claims)
            bench.database.claim("w2", 4, 60, Selection())

    taken: list = []
    first_claim = bench.database.claim

    def claim(worker, *rest):
        prompts = first_claim(worker, *rest)
        if worker == "w1" and not taken:
            taken.extend(prompts)
        return prompts

    bench.database.claim = claim
    bench.work(Painter(fault))
    assert bench.counts == (0, 4, 6, 0)
    assert bench.tally.completed == 6


def test_a_limit_is_kept(bench):
    """``limit`` is how many prompts a run takes, also when it is no multiple of the batch size."""
    bench.work(Painter(), limit=6)
    assert bench.counts == (4, 0, 6, 0)


def test_a_prompt_that_kills_its_workers_is_abandoned(tmp_path):
    """A prompt that was on the device when five workers died is given up without another try."""
    bench, selection = Bench(tmp_path, 1), Selection()
    for deaths in range(5):
        (prompt,) = bench.database.claim("doomed", 1, 0, selection)
        assert prompt.deaths == deaths
        bench.database.start([prompt.claim])
    painter = Painter()
    bench.work(painter)
    assert bench.database.counts(selection).errors == {"abandoned": 1}
    assert painter.batches == []
    bench.database.close()
