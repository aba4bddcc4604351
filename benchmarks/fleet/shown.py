"""A fleet's figures as docs/scale.md shows them: the trials, and how many GPUs a database serves by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.results import shown, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

KEPT_UP = 0.9
"""Of the devices' time: where they are busy for less, the database is the limit."""
_COLUMNS = (
    *("database", "workers", "s a picture", "prompts/s", "busy", "claim ms p50", "p99", "twice"),
    *("lock waits", "lost rounds", "asked again"),
)
_USUAL = 2.0
"""Seconds a picture of the GPU that the limit is told in."""


def fleet(document: Mapping[str, Any]) -> str:
    """The trials as a table, and a sentence for each database."""
    rows = document["rows"]
    names = dict.fromkeys(row["database"] for row in rows)
    narrow = table([{name: row[name] for name in _COLUMNS} for row in rows])
    limits = [_limit(name, [row for row in rows if row["database"] == name]) for name in names]
    return "\n".join([narrow, "", *limits, "", f"{document['note']}\n"])


def _limit(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    most = max(row["prompts/s"] for row in rows)
    at_least = "" if any(row["busy"] < KEPT_UP for row in rows) else "at least "
    return (
        f"- {name}: {at_least}{shown(most)} prompts a second, as many as {at_least}{int(most * _USUAL)} GPUs"
        f" at {_USUAL:g} s a picture make."
    )
