"""The LoRA benchmark: its machinery with an engine that sleeps, and what becomes of its figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import loras
from benchmarks.results import report

SLEEPING = Path(__file__).parents[1] / "fakes" / "sleeping.py"


def test_both_kinds_are_run_and_compared():
    """A round has both paces, by runs that made every picture, and their ratio."""
    (row,) = loras.measure(3, 2, 1, SLEEPING)
    assert row["round"] == 1
    assert row["one LoRA images/s"] > 0
    assert row["three ÷ one"] == row["three LoRAs images/s"] / row["one LoRA images/s"]


def test_a_run_that_fails_is_no_figure(tmp_path):
    """The status and the end of the log are the error."""
    (tmp_path / "broken.py").write_text("import sys; sys.exit('no weights')")
    with pytest.raises(RuntimeError, match="status 1: no weights"):
        loras.measure(1, 1, 1, tmp_path / "broken.py")


def test_the_median_of_the_ratios_is_judged():
    """Of three rounds the middle ratio counts, and the table shows them all."""
    rows = [
        {"round": n, "one LoRA images/s": 2.0, "three LoRAs images/s": 2.0 * ratio, "three ÷ one": ratio}
        for n, ratio in enumerate((0.95, 0.2, 0.8), 1)
    ]
    outcome = loras.result(100, 8, rows)
    assert [(check.measured, check.met) for check in outcome.checks] == [(0.8, False)]
    assert loras.result(100, 8, rows[:1]).status == 0
    assert outcome.settings["rounds"] == 3
    assert "three LoRAs" in report(outcome)
    assert "MISSED: prompts alternating over three LoRAs" in report(outcome)
