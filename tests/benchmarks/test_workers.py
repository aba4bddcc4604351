"""The workers benchmark: one run of its machinery, and what becomes of its figures."""

from __future__ import annotations

from benchmarks import workers
from benchmarks.results import report


def test_a_run_makes_all_its_pictures_and_has_a_pace():
    """The pace is the run's own; a run that does not make them all would be an error."""
    assert workers.pace(1, 3, 0.0) > 0


def test_the_median_of_the_ratios_is_judged():
    """Three workers have to make nine tenths of three times as much as one; the middle round counts."""
    rows = [
        {"round": n, "one": 2.0, "several": 2.0 * ratio, "several ÷ one": ratio}
        for n, ratio in enumerate((2.9, 1.0, 2.8), 1)
    ]
    outcome = workers.result(3, 24, 0.25, rows)
    assert [(check.measured, check.met) for check in outcome.checks] == [(2.8, True)]
    assert workers.result(4, 24, 0.25, rows).status == 1
    assert outcome.settings["pictures a worker"] == 24
    assert "3 workers ÷ one" in report(outcome)
