"""Prompts and results in one SQLite file, for one machine, through the Protocols of text2img.databases.

The tables can be filled and read in the sqlite3 shell. Network file systems do not work: their locks are
unreliable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from text2img.databases import Database
from text2img.databases.sqlite.outbox import SqliteOutbox
from text2img.databases.sqlite.queue import SqliteQueue
from text2img.databases.sqlite.run_store import SqliteResults, SqliteRunStore
from text2img.databases.sqlite.session import Session

if TYPE_CHECKING:
    from text2img.databases import Collections

__all__ = ["sqlite_database"]


def sqlite_database(url: str, collections: Collections) -> Database:
    """Return the database of a ``sqlite:///`` URL, not opened yet.

    Raises ConfigurationError for a URL that names no file.
    """
    return database_of(Session(url, collections))


def database_of(session: Session) -> Database:
    """Return the database whose parts share this session."""
    return Database(
        connection=session,
        queue=SqliteQueue(session),
        outbox=SqliteOutbox(session),
        runs=SqliteRunStore(session),
        results=SqliteResults(session),
    )
