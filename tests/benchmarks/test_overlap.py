"""The overlap benchmark: all that takes part in it once, and what becomes of its figures."""

from __future__ import annotations

from benchmarks import overlap
from benchmarks.contestants import Pace, Task
from benchmarks.overlap import Round
from benchmarks.results import report

TASK = Task(pictures=5, batch=5, side=64, seconds=0.0)


def test_all_three_make_their_pictures():
    """The job, far from its servers, the loop and the script each have a pace; the job waits to begin."""
    (turn,) = overlap.measure(TASK, 1, ["--upload-workers", "2"])
    for pace in (turn.bare, turn.job, turn.serial):
        assert 0 < pace.done <= pace.device
    assert turn.job.start > 0


def test_a_job_that_waits_for_its_uploads_misses_the_target():
    """The medians of the rounds' ratios are judged; the JSON says which further arguments the job had."""
    turns = [
        Round(
            bare=Pace(device=10.0, done=10.0, start=0.0),
            job=Pace(device=9.9, done=job, start=0.5),
            serial=Pace(device=2.0, done=2.0, start=0.1),
        )
        for job in (4.0, 4.5, 9.9)
    ]
    outcome = overlap.result(TASK, turns, ["--upload-workers", "1"])
    assert [(check.measured, check.met) for check in outcome.checks] == [(0.45, False), (2.25, True)]
    assert outcome.settings["job's further arguments"] == ["--upload-workers", "1"]
    assert outcome.rows[0]["the same, to the last batch's end"] == 0.99
    assert "MISSED: job ÷ bare loop" in report(outcome)
    assert overlap.result(TASK, turns[2:], []).status == 0
