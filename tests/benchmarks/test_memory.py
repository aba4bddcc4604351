"""The memory benchmark: its machinery in short, and what becomes of its series."""

from __future__ import annotations

import json

from benchmarks import memory
from benchmarks.contestants import Task

MEBIBYTE = 2**20


def test_what_the_process_holds_is_read_after_each_batch():
    """A reading is higher by what was kept since the one before."""
    engine, task = memory.Watched(64), Task(pictures=3, batch=2, side=64, seconds=0.0)
    engine.generate([task.request(0), task.request(1)], lambda _done, _of: None)
    kept = b"x" * 100 * MEBIBYTE
    engine.generate([task.request(2)], lambda _done, _of: None)
    (first, before), (second, after) = engine.series
    assert (first, second) == (2, 3)
    assert after - before > len(kept) / 2


def test_a_mebibyte_a_batch_misses_the_target():
    """An engine that keeps a mebibyte of every batch has grown by nearly half at the end."""
    seen = [(10 * n, (100 + n) * MEBIBYTE) for n in range(1, 61)]
    outcome = memory.result(seen, 64)
    assert outcome.status == 1
    assert round(outcome.checks[0].measured) == 48


def test_a_flat_series_reaches_the_target_and_one_bad_reading_changes_nothing():
    """What grows at the start and stays then is no growth; a single high reading is not either."""
    seen = [(10 * n, 100 if n > 5 else 50) for n in range(1, 101)]
    seen[99] = (1000, 500)
    assert memory.result(seen, 64).checks[0].measured == 0
    assert memory.result(seen, 64).status == 0


def test_the_series_is_kept(tmp_path, capsys):
    """The JSON holds a reading for each batch, of a process without torch."""
    memory.main(["--prompts", "100", "--side", "64", "--results", str(tmp_path)])
    kept = json.loads((tmp_path / "memory.json").read_text())
    assert [made for made, _ in kept["series"]] == list(range(10, 101, 10))
    assert all(held < 200 * MEBIBYTE for _, held in kept["series"])
    assert "resident MiB" in capsys.readouterr().out
