"""The overlap benchmark, in short: servers, distances, the job, the bare loop and the serial script."""

from __future__ import annotations

import json

from benchmarks import overlap
from benchmarks.contestants import Task


def test_a_job_that_waits_for_its_uploads_misses_the_target(tmp_path, capsys):
    """One upload at a time over 150 ms cannot keep up with a quick device; the JSON says why."""
    short = ["--pictures", "30", "--side", "64", "--seconds", "0.02", "--rounds", "1"]
    assert overlap.main([*short, "--results", str(tmp_path), "--", "--upload-workers", "1"]) == 1
    kept = json.loads((tmp_path / "overlap.json").read_text())
    assert kept["checks"][0]["measured"] < 0.5
    assert kept["settings"]["job's further arguments"] == ["--upload-workers", "1"]
    assert "MISSED: job ÷ bare loop" in capsys.readouterr().out


def test_the_job_works_while_the_device_does():
    """At a usual device's pace the job is far ahead of the serial script, and no faster than the loop."""
    task = Task(pictures=40, batch=10, side=64, seconds=0.1)
    (turn,) = overlap.measure(task, 1, [])
    assert turn.serial.done * 1.5 < turn.job.done
    assert turn.bare.device * 0.7 < turn.job.device <= turn.bare.device * 1.02
