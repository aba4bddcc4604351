"""A trigger in a SQLite file, that holds back the statement at which a worker shall die.

There is no wire before SQLite to stand a gate at, but the file's owner may put a trigger into it. It runs
inside the worker's own transaction and never ends; what the transaction has changed, nobody else sees.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

_SPILL = 16 * 2**20
"""Bytes, many times SQLite's cache (2 MB) and what its log grows to (4 MB) before it starts afresh."""
_SET = """
PRAGMA wal_checkpoint(TRUNCATE);
CREATE TABLE hold (rows_to_go INTEGER, spilt BLOB);
INSERT INTO hold VALUES ({nth}, NULL);
CREATE VIEW forever AS WITH RECURSIVE number(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM number)
    SELECT n FROM number;
CREATE TRIGGER holding {event} BEGIN
    UPDATE hold SET rows_to_go = rows_to_go - 1;
    UPDATE hold SET spilt = zeroblob({spill}) WHERE rows_to_go = 0;
    SELECT CASE rows_to_go WHEN 0 THEN (SELECT count(*) FROM forever) END FROM hold;
END;
"""
_LIFT = "DROP TRIGGER holding; DROP VIEW forever; DROP TABLE hold;"


@dataclass(frozen=True)
class Sight:
    """A point that is seen from outside, by a condition that is true once it is ``reached``."""

    is_set: object

    @property
    def reached(self):
        return self


@contextmanager
def holding(file, event, nth):
    """For the block's time a transaction stands at the ``nth`` row for which the event fires.

    That it stands there is seen by the file's log: the trigger writes more than the cache holds, and the log
    takes what spills, although it is never committed.
    """
    log = Path(f"{file}-wal")
    with _open(file) as database:
        database.executescript(_SET.format(nth=nth, event=event, spill=_SPILL))
    try:
        yield Sight(lambda: log.exists() and log.stat().st_size > _SPILL // 2)
    finally:
        with _open(file) as database:
            database.executescript(_LIFT)


def _open(file):
    return closing(sqlite3.connect(file, timeout=15))
