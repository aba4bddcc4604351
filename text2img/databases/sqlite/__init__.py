"""Prompts and results in one SQLite file, for one machine. The contract is that of text2img.databases.

The tables are plain enough to be filled and read in the sqlite3 shell. Network file systems do not lock
well enough for it.
"""

from __future__ import annotations

from text2img.databases.sqlite.outbox import SqliteOutbox
from text2img.databases.sqlite.queue import SqliteQueue
from text2img.databases.sqlite.run_store import SqliteResults, SqliteRunStore

__all__ = ["SqliteDatabase"]


class SqliteDatabase(SqliteQueue, SqliteOutbox, SqliteRunStore, SqliteResults):
    """A SQLite database by its URL; whatever may be asked of it stands in text2img.databases.Database.

    ``open`` must come first; raises ConfigurationError for a URL that names no file.
    """
