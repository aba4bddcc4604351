"""What a SQLite database says of the claims on its prompts."""

from __future__ import annotations

import sqlite3
from contextlib import closing

_RUNNING = (
    "SELECT 1 FROM datasets WHERE status = 'processing'"
    " AND lease_expires_at > strftime('%Y-%m-%dT%H:%M:%f', 'now')"
)


def any_runs(path):
    """Say whether a prompt's claim has a lease that still runs, though its worker may be dead."""
    with closing(sqlite3.connect(path, timeout=30)) as database:
        return database.execute(_RUNNING).fetchone() is not None
