"""How many commands a whole run sends to MongoDB, however its prompts are mixed."""

from __future__ import annotations

import random

import pytest

from tests.painter import Bench, Painter
from text2img.databases import NewPrompt, Selection
from text2img.prompts import PromptId, RequestedParameters

PROMPTS = 100
CHECK = 3  # commands that look for the collections and try the results before the first claim


@pytest.mark.parametrize("shapes", [1, 5, 20])
def test_a_run_sends_few_commands_a_prompt(tmp_path, mongo_stand, counter, shapes):
    """At batch size 10: at most 0.6 a prompt (heartbeats and the check of the results aside), for one shape
    and for 5 or 20 at random.
    """
    bench, chance = Bench(tmp_path, 0, mongo_stand.backend.url), random.Random(shapes)
    bench.database.runs.enqueue(
        NewPrompt(
            id=PromptId("int", str(n)),
            text="a cat",
            requested=RequestedParameters(seed=n, num_inference_steps=chance.randint(1, shapes)),
        )
        for n in range(PROMPTS)
    )
    counter.names.clear()
    painter = Painter()
    bench.work(painter, batch_size=10, waiting=PROMPTS)
    sent = len(counter.names)
    assert bench.counts == (0, 0, PROMPTS, 0)
    assert len(painter.batches) > PROMPTS / 10 or shapes == 1
    assert sent - CHECK <= 0.6 * PROMPTS, sent
    assert bench.database.runs.counts(Selection()).undelivered == 0
    bench.database.close()


def test_a_full_batch_is_recorded_by_itself_and_at_once(tmp_path, mongo_stand, counter):
    """One command for its results and one for its prompts: nothing waits for the batch after it."""
    bench = Bench(tmp_path, 30, mongo_stand.backend.url)
    recorded, kept = [], bench.database.queue.record

    def record(outcomes, run_id, **options):
        before = len(counter.names)
        written = kept(outcomes, run_id, **options)
        recorded.append((len(outcomes), counter.names[before:].count("update") >= 2))
        return written

    bench.database.queue.record = record
    bench.work(Painter(), batch_size=10)
    assert recorded == [(10, True)] * 3
    bench.database.close()
