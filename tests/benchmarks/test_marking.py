"""What marks cost: the tables of the page are the figures that were saved, and the benchmark still runs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.marking import SIDES, credentials, encodings, result
from benchmarks.results import RESULTS, read, table
from text2img.images.provenance import ManifestSigner

PAGE = Path(__file__).parents[2] / "docs" / "marking.md"


def test_the_page_shows_the_figures_that_are_kept():
    """The table in docs/marking.md is the rows of the saved result."""
    assert table(read(RESULTS / "marking.json")["rows"]) in PAGE.read_text(encoding="utf-8")


def test_each_format_is_measured_in_each_way(tmp_path, monkeypatch):
    """A row for each format and size, with and without marks; pairs become their median quotient."""
    monkeypatch.setattr("benchmarks.marking.SIDES", (16,))
    rows = encodings(ManifestSigner(*credentials(tmp_path)), 1)
    assert [row["format"] for row in rows] == ["png", "jpeg", "webp"]
    assert {row["pixels"] for row in rows} == {"16²"}
    checks = result([{"XMP ÷ plain": 1.0}], [(10.0, 9.5), (10.0, 8.0), (10.0, 9.9)]).checks
    assert [(check.measured, check.met) for check in checks] == [(1.0, True), (0.95, True)]
    assert SIDES == (512, 1024)
