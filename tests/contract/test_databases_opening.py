"""Opening, on every database: again, and without leaving a trace."""

from __future__ import annotations

from tests.contract.database_suite import ALL, MINUTE, opened, texts
from text2img.databases import Collections, open_database


def test_opening_again_is_harmless(stand):
    """A second worker that opens the same database finds what is there, and both work on."""
    stand.put({"_id": 1}, {"_id": 2})
    other = opened(stand.backend.url)
    try:
        assert texts(other.queue.claim("b", 1, MINUTE, ALL)) == ["1"]
        stand.database.connection.open()
        assert texts(stand.claim("a")) == ["2"]
    finally:
        other.close()
        other.close()


def test_opened_without_create_nothing_is_written(stand):
    """A look at a database that has only what its owner made finds the prompts and leaves no trace."""
    stand.put({"_id": 1})
    names = Collections(model_configs="no_1", dataset_records="no_2", runs="no_3", callbacks="no_4")
    looking = open_database(stand.backend.url, names, create=False)
    try:
        assert texts(looking.queue.peek(5, ALL)) == ["1"]
        assert looking.runs.model_configuration(None) is None
        assert (looking.runs.last_runs(3), looking.runs.counts(ALL).pending, looking.queue.pending(ALL)) == (
            [],
            1,
            1,
        )
    finally:
        looking.close()
    assert not any(stand.backend.has(name) for name in ("no_1", "no_2", "no_3", "no_4"))
