"""The results as files and as the README's table."""

from __future__ import annotations

import json

import pytest

from benchmarks.fleet.shown import fleet
from benchmarks.results import RESULTS, Check, Result, read, report
from benchmarks.table import BEGIN, END, FLEET_BEGIN, FLEET_END, README, block, fleet_block, placed

REACHED = Check(figure="job ÷ loop", measured=0.97, target=0.95)
MISSED = Check(figure="start", measured=0.4, target=0.3, at_least=False, unit="s")


def _result(**changes):
    made = {
        "benchmark": "overlap",
        "checks": [REACHED],
        "settings": {},
        "rows": [{"a": 1, "b": 0.5}],
        "note": "x",
    }
    return Result(**{**made, **changes})


def test_the_readme_shows_the_results_that_are_kept():
    """The tables in the README are what ``python -m benchmarks.table`` prints of the JSON files beside it."""
    readme = README.read_text(encoding="utf-8")
    assert readme.partition(BEGIN)[2].partition(END)[0] == block()
    assert readme.partition(FLEET_BEGIN)[2].partition(FLEET_END)[0] == fleet_block()


def test_without_a_gpus_result_nothing_is_claimed_of_one():
    """Either there is a result of the GPU benchmark, or the README says that there is none."""
    readme, none = README.read_text(encoding="utf-8"), not (RESULTS / "gpu.json").exists()
    assert [said in readme for said in ("No GPU was at hand", "It has not run on a GPU")] == [none, none]


def test_a_missed_target_is_a_status_and_a_word():
    """One figure on the wrong side of its target makes status 1, and both tables say which."""
    assert (_result().status, _result(checks=[REACHED, MISSED]).status) == (0, 1)
    assert "MISSED: start: 0.4 s (target ≤ 0.3 s)" in report(_result(checks=[REACHED, MISSED]))
    assert not Check(figure="x", measured=float("nan"), target=0.0).met


def test_a_result_is_kept_with_what_it_takes_to_judge_it(tmp_path):
    """Date, machine, versions and commit stand in the JSON, and the checks come back as they were."""
    file = _result(checks=[REACHED, MISSED]).save(tmp_path)
    kept = json.loads(file.read_text())
    assert all(kept[name] for name in ("date", "machine", "python", "versions", "commit"))
    assert [each["met"] for each in kept["checks"]] == [True, False]
    assert read(file)["checks"] == [REACHED, MISSED]
    assert [each.name for each in tmp_path.iterdir()] == ["overlap.json"]


def test_the_table_goes_between_the_marks(tmp_path):
    """All else in the README stays; a missed target is marked; without marks nothing is written."""
    _result(checks=[REACHED, MISSED]).save(tmp_path)
    fresh = block(tmp_path)
    assert "| job ÷ loop | ≥ 0.95 | 0.97 | `python -m benchmarks.overlap` |" in fresh
    assert "| start | ≤ 0.3 s | 0.4 s (missed) |" in fresh
    assert placed(f"a\n{BEGIN}old{END}\nz", fresh) == f"a\n{BEGIN}{fresh}{END}\nz"
    with pytest.raises(ValueError, match="lacks"):
        placed("a README", fresh)


def test_a_rehearsal_is_no_result(tmp_path):
    """What was only rehearsed reaches no target, misses none, and never comes into the table."""
    rehearsed = _result(checks=[MISSED], rehearsal=True)
    rehearsed.save(tmp_path)
    assert (rehearsed.status, "rehearsed: start" in report(rehearsed)) == (0, True)
    with pytest.raises(ValueError, match="no result"):
        block(tmp_path)


def test_a_fleet_s_limit_is_told_in_gpus():
    """What a database recorded at the most is so many GPUs' work, and "at least" where all were kept busy."""
    row = dict.fromkeys(("workers", "s a picture", "claim ms p50", "p99", "twice", "lock waits"), 0)
    row |= {"lost rounds": 0, "asked again": 0}
    rows = [{"database": name, "prompts/s": pace, "busy": busy, **row} for name, pace, busy in (
        ("A", 60.0, 0.95), ("A", 70.0, 0.5), ("B", 30.0, 0.95),
    )]  # fmt: skip
    said = fleet({"rows": rows, "note": "busy cores"})
    assert "- A: 70 prompts a second, as many as 140 GPUs at 2 s a picture make." in said
    assert "- B: at least 30 prompts a second, as many as at least 60 GPUs" in said
    assert said.endswith("busy cores\n")
