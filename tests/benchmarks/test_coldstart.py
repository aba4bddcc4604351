"""The cold-start benchmark: what becomes of its figures, and that its commands are counted."""

from __future__ import annotations

import json

import pytest

from benchmarks import coldstart
from benchmarks.coldstart import Seen, Start


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


def test_medians_and_heavy_imports_are_judged():
    """The median of a command's starts is compared with its target; one that imports torch misses another."""
    bare = Seen(Start("bare", ("-c", "pass"), 0, None), [0.01], 30, [])
    quick = Seen(Start("quick", (), 0, 0.3), [0.1, 9.0, 0.2], 100, [])
    slow = Seen(Start("slow", (), 0, 0.3), [0.4, 0.1, 0.5], 900, ["torch"])
    outcome = coldstart.result(3, [bare, quick, slow])
    assert [(check.figure, check.measured, check.met) for check in outcome.checks] == [
        ("quick", 0.2, True),
        ("slow", 0.4, False),
        ("torch, diffusers and transformers among their imports", 1, False),
    ]
    assert outcome.rows[1] == {
        "command": "quick", "median s": 0.2, "least s": 0.1, "most s": 9.0, "modules": 100, "heavy": "none",
    }  # fmt: skip
    assert (outcome.rows[2]["heavy"], outcome.status) == ("torch", 1)


def test_torch_among_the_imports_is_seen(tmp_path):
    """A command that imports a module called torch has it in its figures, by name."""
    (tmp_path / "torch.py").write_text("import json\n")
    heavy = Start("heavy", ("-c", "import torch"), 0, 1.0)
    modules, names = coldstart.imported(heavy, tmp_path)
    assert (modules > 20, names) == (True, ["torch"])


@pytest.mark.parametrize("measure", [coldstart.seconds, coldstart.imported])
def test_a_command_that_fails_is_no_figure(tmp_path, measure):
    """How quickly something breaks says nothing: an unexpected exit status is an error."""
    broken = Start("broken", ("-c", "raise SystemExit(3)"), 0, 1.0)
    with pytest.raises(RuntimeError, match="broken ended with status 3"):
        measure(broken, tmp_path)
