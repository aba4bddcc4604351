"""The results as files, as tables of docs/, and as figures in the README."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.fleet.shown import fleet
from benchmarks.results import RESULTS, Check, Result, read, report
from benchmarks.table import (
    BEGIN,
    DOCS,
    END,
    FLEET_BEGIN,
    FLEET_END,
    FLEET_PAGE,
    SPEED_PAGE,
    block,
    fleet_block,
    placed,
)

REACHED = Check(figure="job ÷ loop", measured=0.97, target=0.95)
README = Path(__file__).parents[2] / "README.md"
HIGHLIGHTS = {
    "coldstart.json": ["a run with nothing to do"],
    "loras.json": ["prompts alternating over three LoRAs ÷ prompts with one, images/s"],
    "memory.json": ["growth of resident memory from 1,000 to 10,000 prompts"],
    "overlap.json": ["job ÷ bare loop, images/s", "job ÷ plain serial script, images/s"],
    "workers.json": ["4 workers ÷ one, images/s"],
}
"""The figures that the README repeats, by the file that holds them."""

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


def test_the_pages_show_the_results_that_are_kept():
    """The tables in docs/ are what ``python -m benchmarks.table`` prints of the JSON files."""
    speed, trials = (page.read_text(encoding="utf-8") for page in (SPEED_PAGE, FLEET_PAGE))
    assert speed.partition(BEGIN)[2].partition(END)[0] == block()
    assert trials.partition(FLEET_BEGIN)[2].partition(FLEET_END)[0] == fleet_block()


def test_the_readme_s_figures_are_those_that_are_kept():
    """The README's reasons name the figures of the JSON files, and its summary of the chaos table."""
    reasons = README.read_text(encoding="utf-8").partition("<!-- why:")[2].partition("<!-- end of why -->")[0]
    measured = {check.figure: check for name in HIGHLIGHTS for check in read(RESULTS / name)["checks"]}
    figures = [figure for names in HIGHLIGHTS.values() for figure in names]
    assert [figure for figure in figures if measured[figure].measured_shown not in reasons] == []
    best = max(
        row["prompts/s"] for row in read(RESULTS / "fleet.json")["rows"] if row["database"] == "SQLite"
    )
    assert f"a SQLite file serves {best:.0f} prompts a second" in reasons
    kills = re.search(r"of (\d+) tries", (DOCS / "reliability.md").read_text(encoding="utf-8"))
    assert f"In {kills[1]} runs" in reasons


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        (README, "It has not run on a GPU"),
        (DOCS / "limits.md", "It has not run on a GPU"),
        (SPEED_PAGE, "No GPU was at hand"),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_without_a_gpus_result_nothing_is_claimed_of_one(page, sentence):
    """Either there is a result of the GPU benchmark, or the page says that there is none."""
    assert (sentence in page.read_text(encoding="utf-8")) == (not (RESULTS / "gpu.json").exists())


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
    """All else in the page stays; a missed target is marked; without marks nothing is written."""
    _result(checks=[REACHED, MISSED]).save(tmp_path)
    fresh = block(tmp_path)
    assert "| job ÷ loop | ≥ 0.95 | 0.97 | `python -m benchmarks.overlap` |" in fresh
    assert "| start | ≤ 0.3 s | 0.4 s (missed) |" in fresh
    assert placed(f"a\n{BEGIN}old{END}\nz", fresh) == f"a\n{BEGIN}{fresh}{END}\nz"
    with pytest.raises(ValueError, match="lacks"):
        placed("a page", fresh)


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
