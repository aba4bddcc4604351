"""Prompts and results in one SQLite file, for one machine, through the Protocols of text2img.databases.

The tables can be filled and read in the sqlite3 shell. Network file systems do not work: their locks are
unreliable.
"""

from __future__ import annotations

from text2img.databases.sqlite.outbox import SqliteOutbox
from text2img.databases.sqlite.queue import SqliteQueue
from text2img.databases.sqlite.run_store import SqliteResults, SqliteRunStore

__all__ = ["SqliteDatabase"]


class SqliteDatabase(SqliteQueue, SqliteOutbox, SqliteRunStore, SqliteResults):
    """A SQLite database, given by its URL; see text2img.databases.Database for its methods.

    Call ``open`` first. Raises ConfigurationError for a URL that names no file.
    """
