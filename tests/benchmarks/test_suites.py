"""The table of what the suites cost: how pytest's last line becomes a row."""

from __future__ import annotations

import pytest

from benchmarks import suites


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("....\n2607 passed, 55 skipped in 1153.10s (0:19:13)\n", {"passed": 2607, "skipped": 55}),
        ("F\n1 failed, 3 passed, 9 deselected in 2.1s", {"failed": 1, "passed": 3}),
        ("", {}),
    ],
)
def test_counts_are_those_of_the_last_line(output, expected):
    """Passed, failed and skipped are read; what was deselected is no outcome."""
    assert suites.counts(output) == expected


def test_a_row_holds_the_counts_and_the_seconds():
    """Each figure stands under its heading, in whole seconds."""
    made = suites.row("unit", suites.Cost({"passed": 12, "skipped": 1}, 34.6, 20.2))
    assert made == {"suite": "unit", "tests": "12 passed, 1 skipped", "processor s": "35", "wall s": "20"}


def test_every_folder_of_tests_is_a_suite():
    """No folder with tests is left out of the table, but for those that need a GPU."""
    folders = {path.parent.name for path in (suites.ROOT / "tests").glob("*/test_*.py")}
    assert folders - {"gpu"} <= set(suites.SUITES)
