"""The flow with LoRAs that are slow to come, or never do: a library whose answers the tests hold back."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections import defaultdict
from contextlib import closing

import pytest

from tests.painter import Bench, Painter
from tests.waiting import until
from text2img.databases import Selection
from text2img.errors import ErrorCode, PromptFailed, Stopped


@pytest.fixture
def bench(tmp_path):
    """Ten prompts."""
    made = Bench(tmp_path, 10)
    yield made
    made.database.close()


class ModelCache:
    """A library whose LoRAs come when their event is set; "bad" ones never do, with a reason."""

    def __init__(self):
        self.events, self.asked = defaultdict(threading.Event), []

    def wait(self, seconds):
        pass

    def file(self, lora):
        self.asked.append(lora.path)
        self.events[lora.path].wait()
        if lora.path == "bad":
            raise PromptFailed(ErrorCode.LORA_FAILED, "it is torn")
        return f"/here/{lora.path}"


def _styled(bench, styles):
    with closing(sqlite3.connect(bench.file)) as rows, rows:
        rows.executemany(
            "UPDATE datasets SET lora = ? WHERE _id = ?",
            [(json.dumps({"path": path}), number) for number, path in styles.items()],
        )


def test_what_waits_for_no_lora_goes_first(bench):
    """Prompts whose LoRAs are here are drawn while another one is fetched, which then goes with its like."""
    shelf, painter = ModelCache(), Painter()
    bench.loras = shelf
    _styled(bench, {0: "late", 1: "late", 2: "soon"})
    shelf.events["soon"].set()
    painter.fault = lambda request: len(painter.batches) == 3 and shelf.events["late"].set()
    bench.work(painter)
    assert bench.counts == (0, 0, 10, 0)
    assert set(painter.batches[-1]) == {"0", "1"}
    assert ["2"] in painter.batches


def test_a_bad_lora_fails_only_who_asked_for_it(bench):
    """Its prompts end in lora_failed with the reason, once each, and all others complete."""
    shelf, painter = ModelCache(), Painter()
    bench.loras = shelf
    _styled(bench, {0: "bad", 1: "good", 2: "bad"})
    for path in ("bad", "good"):
        shelf.events[path].set()
    bench.work(painter)
    assert bench.counts == (0, 0, 8, 2)
    assert bench.database.runs.counts(Selection()).errors == {"lora_failed": 2}
    assert not {"0", "2"} & {prompt for batch in painter.batches for prompt in batch}


def test_claims_are_bounded_while_loras_are_fetched(tmp_path):
    """With no LoRA coming, no more is claimed than some batches' worth, and nothing is drawn."""
    bench, shelf, painter, looks = Bench(tmp_path, 100), ModelCache(), Painter(), []
    bench.loras, shelf.wait = shelf, lambda _: looks.append(bench.counts[1])
    _styled(bench, dict.fromkeys(range(100), "late"))
    work = threading.Thread(target=bench.work, args=(painter,))
    work.start()
    try:
        until(lambda: looks[-3:].count(bench.counts[1]) == 3)  # it looks again and again, and claims no more
        assert 6 * 4 < bench.counts[1] <= 6 * 4 + 8
        assert (painter.batches, work.is_alive()) == ([], True)
    finally:
        shelf.events["late"].set()
    work.join()
    assert bench.counts == (0, 0, 100, 0)
    bench.database.close()


def test_a_stop_ends_the_wait_for_a_lora(bench):
    """Stopped while nothing is left but a LoRA that does not come, a run ends and releases its claims."""
    shelf = ModelCache()
    shelf.wait = bench.stop.wait
    bench.loras = shelf
    _styled(bench, dict.fromkeys(range(10), "late"))

    def ask():
        until(lambda: shelf.asked)
        bench.stop.set(15)

    asker = threading.Thread(target=ask)
    asker.start()
    with pytest.raises(Stopped):
        bench.work(Painter())
    asker.join()
    shelf.events["late"].set()
    assert bench.counts == (10, 0, 0, 0)
