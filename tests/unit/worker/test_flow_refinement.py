"""The flow in a loop: judged pictures, further iterations, and how they end before their time."""

from __future__ import annotations

import threading

import pytest

from tests.painter import Bench, Painter
from text2img.concurrency.signals import Stop
from text2img.databases import Selection
from text2img.errors import Stopped
from text2img.prompts import Evaluation
from text2img.prompts.refinement import Loop


class Judge:
    """An evaluator: ``says(text)`` returns a score, or raises."""

    name = "judge"

    def __init__(self, says):
        self._says = says

    def check(self):
        pass

    def load(self):
        pass

    def evaluate(self, pixels, text):
        return Evaluation(evaluator=self.name, score=self._says(text))


@pytest.fixture
def bench(tmp_path):
    """Four prompts."""
    made = Bench(tmp_path, 4)
    yield made
    made.database.close()


def made(bench):
    """The completed prompts by id."""
    return {each.id.text: each for each in bench.database.results.completed(Selection())}


def test_a_stop_before_the_verdict_ends_no_loop(bench):
    """Asked to end while the evaluator thinks, the run gives the prompts back: the next one goes on with the
    iteration that nobody has judged, instead of taking a picture without a score for the result.
    """
    verdicts, over = [], threading.Event()

    def think(text):
        verdicts.append(text)
        if len(verdicts) > 4:  # in the second iteration
            bench.stop.set(15)
            over.wait()  # the run ends before the evaluator does
        return 0.5

    bench.evaluator = Judge(think)
    try:
        with pytest.raises(Stopped):
            bench.work(Painter(), loop=Loop(iterations=3))
    finally:
        over.set()
    assert bench.counts == (4, 0, 0, 0)
    bench.evaluator, bench.stop = Judge(lambda text: 0.5), Stop()
    painter = Painter()
    bench.work(painter, loop=Loop(iterations=3))
    assert sum(map(len, painter.batches)) == 8
    for each in made(bench).values():
        assert (each.iterations, [one["score"] for one in each.tries]) == (3, [0.5, 0.5, 0.5])


def test_an_evaluator_that_breaks_its_word_costs_no_picture(bench):
    """Whatever it raises: the picture is the result, without a score, and says why."""

    def stumble(text):
        raise LookupError(text)

    bench.evaluator = Judge(stumble)
    bench.work(Painter())
    assert bench.counts == (0, 0, 4, 0)
    for each in made(bench).values():
        assert each.evaluation == {
            "evaluator": "judge",
            "error": "the evaluator failed unexpectedly: LookupError",
        }
