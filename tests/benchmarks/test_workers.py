"""The workers benchmark, in short."""

from __future__ import annotations

import json

from benchmarks import workers


def test_three_workers_make_more_than_twice_as_much_as_one(tmp_path, capsys):
    """Even where most of a short run is its beginning and its end; the JSON holds the ratio."""
    short = ["--workers", "3", "--pictures", "24", "--seconds", "0.25", "--rounds", "1"]
    workers.main([*short, "--results", str(tmp_path)])
    (check,) = json.loads((tmp_path / "workers.json").read_text())["checks"]
    assert 2 < check["measured"] <= 3.05
    assert "3 workers ÷ one" in capsys.readouterr().out
