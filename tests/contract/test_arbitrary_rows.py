"""Rows that nobody should have written into SQLite: each is done or refused with a reason; no run dies."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests import arbitrary
from tests.examples import examples
from tests.painter import Bench, Painter
from text2img.databases import Selection
from text2img.errors import ErrorCode
from text2img.webhooks.payloads import callback_payload

LATIN = "CAST(x'4A6FF1' AS TEXT)"  # "Joñ" as a spreadsheet writes it: no UTF-8


def _literal(value):
    """The value in SQL; bytes that start with T become text, whether they are UTF-8 or not."""
    if value is None or value != value:  # noqa: PLR0124 - NaN, which SQLite keeps as NULL
        return "NULL"
    if isinstance(value, list | dict):
        return _literal(json.dumps(value))
    if isinstance(value, bytes):
        return f"CAST(x'{value[1:].hex()}' AS TEXT)" if value[:1] == b"T" else f"x'{value.hex()}'"
    if isinstance(value, float):
        return repr(value).replace("inf", "9e999")
    return str(value) if isinstance(value, int) else f"CAST(x'{value.encode().hex()}' AS TEXT)"


VALUES = st.one_of(
    st.none(),
    arbitrary.NUMBERS,
    arbitrary.TEXTS,
    st.binary(max_size=12),
    st.binary(max_size=12).map(b"T".__add__),
)


def _write(file, documents):
    """Insert the rows; an id that is there already is passed over."""
    with closing(sqlite3.connect(file)) as connection, connection:
        for document in documents:
            known = {name: value for name, value in document.items() if not name.startswith("my ")}
            values = ", ".join(map(_literal, known.values()))
            connection.execute(f"INSERT OR IGNORE INTO datasets ({', '.join(known)}) VALUES ({values})")  # noqa: S608


def _rows(file):
    with closing(sqlite3.connect(file)) as connection:
        connection.row_factory, connection.text_factory = sqlite3.Row, bytes
        rows = connection.execute("SELECT rowid, * FROM datasets ORDER BY rowid").fetchall()
    return [dict(row) for row in rows]


def _waits(row):
    return row["status"] in {None, b"pending", b"processing"}


@settings(
    phases=[Phase.explicit, Phase.generate],
    max_examples=examples(10),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@given(
    st.lists(arbitrary.documents(VALUES, VALUES.filter(lambda value: _literal(value) != "NULL")), max_size=25)
)
def test_a_run_comes_to_the_end_of_any_rows(tmp_path_factory, rows):
    """A whole pass of a worker leaves every row completed or refused with its reason, others untouched."""
    folder = tmp_path_factory.mktemp("pass")
    bench = Bench(folder, 0)
    with closing(bench.database):
        _write(folder / "prompts.db", rows)
        before = _rows(folder / "prompts.db")
        bench.work(Painter(), notify=True)
        assert bench.counts[:2] == (0, 0)
        told, _ = bench.database.outbox.collect("night", "msg_now", 1000)
        json.loads(callback_payload("night", "completed", told, final=True))
        bench.database.outbox.undelivered_runs()
        assert bench.database.runs.retry(None, Selection()) >= 0
        bench.work(Painter(), notify=True)
    for was, now in zip(before, _rows(folder / "prompts.db"), strict=True):
        # What a dead run had marked as untold anybody may gather again.
        own = arbitrary.OWN if _waits(was) or was["status"] == b"error" else ("untold",)
        kept = set(was) - set(own)
        assert {name: was[name] for name in kept} == {name: now[name] for name in kept}
        if _waits(was):
            assert now["status"] in {b"completed", b"error"}
        if _waits(was) and now["status"] == b"error":
            assert now["error_code"].decode() in {*ErrorCode}
            assert now["error"].strip()
            assert len(now["error"].splitlines()) == 1


def test_an_id_that_is_no_utf8_is_made_like_any_other(tmp_path):
    """A row whose id came from a Latin-1 spreadsheet gets one picture, as does one of the same bytes."""
    bench = Bench(tmp_path, 0)
    with closing(bench.database), closing(sqlite3.connect(tmp_path / "prompts.db")) as shell:
        shell.execute(f"INSERT INTO datasets (_id, text) VALUES ({LATIN}, 'a cat'), (x'4A6FF1', 'a dog')")  # noqa: S608
        shell.execute(f"INSERT INTO datasets (_id, text) VALUES ('Joñ', {LATIN})")  # noqa: S608
        shell.commit()
        bench.work(Painter(), limit=5)
        assert bench.counts == (0, 0, 2, 1)
        assert len(list(bench.folder.iterdir())) == 2
        assert shell.execute(
            "SELECT count(*), count(DISTINCT dataset_id) FROM dataset_records"
        ).fetchone() == (2, 2)
