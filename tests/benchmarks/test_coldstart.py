"""The cold-start benchmark, in short."""

from __future__ import annotations

import json

import pytest

from benchmarks import coldstart


def test_every_command_is_timed_and_its_imports_counted(tmp_path, capsys):
    """Each row has its times and modules, none of them torch; the interpreter alone imports the fewest."""
    coldstart.main(["--starts", "1", "--results", str(tmp_path)])
    kept = json.loads((tmp_path / "coldstart.json").read_text())
    base, *rows = kept["rows"]
    assert [row["command"] for row in rows] == [
        "--version", "--help", "a wrong option", "a run with nothing to do",
    ]  # fmt: skip
    assert all(row["modules"] > base["modules"] and row["median s"] > 0 for row in rows)
    assert {row["heavy"] for row in rows} == {"none"}
    assert "a wrong option" in capsys.readouterr().out


def test_torch_among_the_imports_is_seen(tmp_path):
    """A command that imports torch is told of by name."""
    heavy = coldstart.Start("heavy", ("-c", "import torch"), 0, 1.0)
    modules, names = coldstart.imported(heavy, tmp_path)
    assert (modules > 100, names) == (True, ["torch"])


def test_a_command_that_fails_is_no_figure(tmp_path):
    """How quickly something breaks says nothing: an unexpected exit status is an error."""
    broken = coldstart.Start("broken", ("-c", "raise SystemExit(3)"), 0, 1.0)
    with pytest.raises(RuntimeError, match="broken ended with status 3"):
        coldstart.seconds(broken, tmp_path)
