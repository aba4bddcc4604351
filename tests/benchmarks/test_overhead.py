"""The overhead benchmark, in short, with files in the place of servers."""

from __future__ import annotations

import json

from benchmarks import overhead


def test_a_prompt_that_costs_more_than_its_picture_misses_the_target(tmp_path, capsys):
    """Pictures so small that the job costs many times their encoding: a figure, a missed target, status 1."""
    arguments = ["--prompts", "20", "--side", "64", "--rounds", "1", "--results", str(tmp_path)]
    assert overhead.main([*arguments, "--database", "sqlite", "--storage", "folder"]) == 1
    kept = json.loads((tmp_path / "overhead.json").read_text())
    (row,), (check,) = kept["rows"], kept["checks"]
    assert row["cpu ms"] > row["encode ms"] > 0
    assert (check["measured"], check["met"]) == (row["cpu ÷ encode"], False)
    assert "MISSED" in capsys.readouterr().out


def test_the_profile_finds_the_encoder(capsys):
    """With large pictures most of the time is spent in encoding, and the profile names it so."""
    arguments = ["--profile", "--prompts", "20", "--side", "512", "--top", "8"]
    assert overhead.main([*arguments, "--database", "sqlite", "--storage", "folder"]) == 0
    by_itself, ours = capsys.readouterr().out.split("our functions")
    assert "ImageFile.py" in by_itself.splitlines()[4]
    assert "formats.py" in ours
