"""The memory benchmark, in short."""

from __future__ import annotations

import json

from benchmarks import memory
from benchmarks.job import apart
from benchmarks.places import places


class Leaking(memory.Watched):
    """Keeps a mebibyte of every batch."""

    def generate(self, batch, on_step):
        self.kept = [*getattr(self, "kept", []), b"x" * 2**20]
        return super().generate(batch, on_step)


def test_an_engine_that_leaks_misses_the_target():
    """A mebibyte a batch is found."""
    with places("sqlite", "folder") as place:
        here = place()
        here.add(600)
        outcome = memory.result(apart(memory.series, here, 64, Leaking), 64)
    assert outcome.status == 1
    assert outcome.checks[0].measured > 5


def test_a_flat_series_reaches_the_target_and_one_bad_reading_changes_nothing():
    """What grows at the start and stays then is no growth; a single high reading is not either."""
    seen = [(10 * n, 100 if n > 5 else 50) for n in range(1, 101)]
    seen[99] = (1000, 500)
    assert memory.result(seen, 64).checks[0].measured == 0
    assert memory.result(seen, 64).status == 0


def test_the_series_is_kept(tmp_path, capsys):
    """The JSON holds a reading for each batch, of a process without torch."""
    memory.main(["--prompts", "200", "--side", "64", "--results", str(tmp_path)])
    kept = json.loads((tmp_path / "memory.json").read_text())
    assert [made for made, _ in kept["series"]] == list(range(10, 201, 10))
    assert all(held < 200 * 2**20 for _, held in kept["series"])
    assert "resident MiB" in capsys.readouterr().out
