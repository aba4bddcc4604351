"""An open SQLite file: one connection per thread, transactions, and one-line error messages."""

from __future__ import annotations

import sqlite3
import threading
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from text2img.databases.sqlite.schema import ID, create_missing, overlay, quoted
from text2img.errors import ConfigurationError, DatabaseFailed, DatabaseMissing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from text2img.databases import Collections

_BUSY_TIMEOUT: Final = 15
"""Seconds to wait for other writers; each locks the file for milliseconds."""
_CACHE_KIB: Final = 256
"""Cache of each thread's connection; the operating system caches the file for all of them."""


class _ThreadConnection:
    """A thread's connection, which another thread may close: at once, or when it is no longer in use.

    SQLite crashes the process if a connection is closed in the middle of a statement.
    """

    def __init__(self, connection: sqlite3.Connection, generation: int) -> None:
        self.connection, self.generation = connection, generation
        self._lock = threading.Lock()
        self._uses = 0
        self._closing = False

    def acquire(self) -> bool:
        """Begin a use; return False if the connection is closed."""
        with self._lock:
            if self._closing:
                return False
            self._uses += 1
            return True

    def release(self) -> None:
        """End a use."""
        with self._lock:
            self._uses -= 1
            if self._closing and not self._uses:
                self.connection.close()

    def close(self) -> None:
        """Reject further uses, and close the connection once no use is left."""
        with self._lock:
            self._closing = True
            if not self._uses:
                self.connection.close()


class Session:
    """The tables of one file, given by a URL: ``sqlite:///relative.db`` or ``sqlite:////absolute.db``.

    Raises ConfigurationError for a URL that names no file, and for a table name that SQLite reserves.
    """

    def __init__(self, url: str, collections: Collections) -> None:
        self.path = path_of(url)
        self.names: dict[str, str] = asdict(collections)
        for name in self.names.values():
            _check_name(name)
        self._quoted = {table: quoted(name) for table, name in self.names.items()}
        self._local = threading.local()
        self._connections: dict[threading.Thread, _ThreadConnection] = {}
        self._lock = threading.Lock()
        self._generation = 0
        self._read_only = False

    def open(self, *, create: bool = True) -> None:
        """Create the file, tables and indexes that are missing; raise DatabaseFailed if that fails.

        Without ``create`` the file is opened read-only, and missing tables and columns appear empty; raises
        DatabaseMissing if the file or its folder does not exist.
        """
        folder = self.path.parent
        if not folder.is_dir():
            kind = DatabaseFailed if create or folder.exists() else DatabaseMissing
            raise kind(f"{folder} is not a folder; create it, or check the path in --database")
        if not create and not self.path.exists():
            raise DatabaseMissing(
                f"{self.path} does not exist; create it by enqueue, or check the path in --database"
            )
        if self._read_only is create:
            self.close()
        self._read_only = not create
        if create:
            with self.writing() as connection:
                create_missing(connection, self.names)
        else:
            with self.reading():
                pass

    def close(self) -> None:
        """Close all connections, including those of other threads; a later call opens a new one.

        A connection that another thread is using is closed when that use ends.
        """
        with self._lock:
            self._generation += 1
            connections, self._connections = self._connections, {}
        for connection in connections.values():
            connection.close()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction that holds the file's write lock from its start; roll back if the body raises.

        The lock is taken at the start: a transaction that reads first and then writes fails if another one
        wrote in between.
        """
        with self.reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Yield this thread's connection; raise SQLite's errors as DatabaseFailed."""
        try:
            own = self._own_connection()
            while not own.acquire():  # closed by another thread since
                own = self._own_connection()
            try:
                yield own.connection
            finally:
                own.release()
        except (sqlite3.Error, OverflowError, UnicodeEncodeError) as exc:
            raise DatabaseFailed(_error_message(exc, self.path)) from exc

    def sql(self, template: str, **pieces: str) -> str:
        """Format a statement: braces name tables (as in Collections), ``id``, and the given pieces."""
        return template.format_map({**self._quoted, "id": ID, **pieces})

    def _own_connection(self) -> _ThreadConnection:
        """Return this thread's connection; open one if it has none or if all have been closed since."""
        own: _ThreadConnection | None = getattr(self._local, "connection", None)
        if own is not None and own.generation == self._generation:
            return own
        connection = _connect_to_read(self.path, self.names) if self._read_only else _connect(self.path)
        with self._lock:
            for dead in [thread for thread in self._connections if not thread.is_alive()]:
                self._connections.pop(dead).close()  # else short-lived threads would exhaust the open files
            opened = _ThreadConnection(connection, self._generation)
            self._connections[threading.current_thread()] = self._local.connection = opened
        return opened


def path_of(url: str) -> Path:
    """Return the file that a URL names; raise ConfigurationError if it names none."""
    _, _, rest = url.partition(":")
    location = unquote(rest.partition("?")[0])
    if not location.startswith("///") or location in {"///", "////"}:
        raise ConfigurationError(
            "write the SQLite file as sqlite:///prompts.db, or sqlite:////data/prompts.db from the root"
        )
    name = location[3:]
    if name == ":memory:":
        raise ConfigurationError("a SQLite database in memory is lost at exit; name a file in --database")
    return Path(name)


def _connect(path: Path) -> sqlite3.Connection:
    # In WAL mode readers and the writer do not block each other.
    return _prepared(str(path), lambda connection: connection.execute("PRAGMA journal_mode = WAL"))


def _connect_to_read(path: Path, names: Mapping[str, str]) -> sqlite3.Connection:
    def prepare(connection: sqlite3.Connection) -> None:
        overlay(connection, names)
        connection.execute("PRAGMA query_only = ON")

    # Not mode=ro: a read-only connection could not delete the files that WAL mode needs.
    return _prepared(f"{path.absolute().as_uri()}?mode=rw", prepare)


def _prepared(name: str, prepare: Callable[[sqlite3.Connection], object]) -> sqlite3.Connection:
    """Open and prepare a connection that begins no transactions by itself."""
    connection = sqlite3.connect(
        name,
        timeout=_BUSY_TIMEOUT,
        isolation_level=None,
        check_same_thread=False,
        uri=name.startswith("file:"),
    )
    try:
        connection.row_factory = sqlite3.Row
        connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_name(name: str) -> None:
    if not name or "\0" in name or name.lower().startswith("sqlite_"):
        raise ConfigurationError(f"{name!r} is not a valid SQLite table name; choose another collection name")


def _error_message(exc: Exception, path: Path) -> str:
    message = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
    code = getattr(exc, "sqlite_errorname", "")
    if code.startswith("SQLITE_NOTADB"):
        return f"{path} is not a SQLite database; check the path in --database"
    if code.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return f"cannot open {path} for writing ({message}); check its permissions and those of its folder"
    if code.startswith("SQLITE_FULL"):
        return f"cannot write {path}: the disk is full; free some space and run it again"
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return f"another program locked {path} for {_BUSY_TIMEOUT} seconds; close it and run it again"
    return f"SQLite file {path}: {message}"
