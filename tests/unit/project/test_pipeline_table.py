"""The page on pipelines has the table that the code has."""

from __future__ import annotations

from pathlib import Path

from tests.engine.pipeline_table import table

PAGE = Path(__file__).parents[3] / "docs" / "pipelines.md"


def test_the_page_has_the_table() -> None:
    """``python -m tests.engine.pipeline_table`` prints what docs/pipelines.md shows."""
    assert table() in PAGE.read_text(encoding="utf-8")
