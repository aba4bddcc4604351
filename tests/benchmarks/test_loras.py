"""The LoRA benchmark, in short."""

from __future__ import annotations

import json

from benchmarks import loras


def test_both_kinds_are_run_and_compared(tmp_path, capsys):
    """Each round has both paces, by runs that made every picture, and their ratio; a table is printed."""
    loras.main(["--prompts", "3", "--steps", "2", "--rounds", "2", "--results", str(tmp_path)])
    kept = json.loads((tmp_path / "loras.json").read_text())
    assert [row["round"] for row in kept["rows"]] == [1, 2]
    for row in kept["rows"]:
        ratio = row["three LoRAs images/s"] / row["one LoRA images/s"]
        assert row["one LoRA images/s"] > 0
        assert row["three ÷ one"] == ratio
    assert "three LoRAs" in capsys.readouterr().out
