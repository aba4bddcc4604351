"""An open SQLite file: a connection for each thread, transactions, and errors in one line each.

Knows nothing of what is done with it.
"""

from __future__ import annotations

import sqlite3
import threading
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from text2img.databases.sqlite.schema import ID, build, overlay, quoted
from text2img.errors import ConfigurationError, DatabaseFailed, DatabaseMissing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from text2img.databases import Collections

_PATIENCE: Final = 15
"""Seconds to wait for other writers; each holds the file for milliseconds."""
_CACHE: Final = 256
"""KiB of the file that a thread's connection keeps; the operating system keeps the file for all of them."""


class _Kept:
    """A thread's connection, which another thread may close: at once, or when the last use of it has ended.

    SQLite ends the process where a connection is closed in the middle of a statement.
    """

    def __init__(self, connection: sqlite3.Connection, generation: int) -> None:
        self.connection, self.generation = connection, generation
        self._lock = threading.Lock()
        self._uses = 0
        self._closing = False

    def take(self) -> bool:
        """Begin a use; False where the connection is closed."""
        with self._lock:
            if self._closing:
                return False
            self._uses += 1
            return True

    def give_back(self) -> None:
        """End a use."""
        with self._lock:
            self._uses -= 1
            if self._closing and not self._uses:
                self.connection.close()

    def close(self) -> None:
        """Let no further use begin, and close the connection when none is left."""
        with self._lock:
            self._closing = True
            if not self._uses:
                self.connection.close()


class Session:
    """The tables of one file, by a URL: ``sqlite:///relative.db`` or ``sqlite:////absolute.db``.

    Raises ConfigurationError for a URL that names no file, and for a table name that SQLite keeps to itself.
    """

    def __init__(self, url: str, collections: Collections) -> None:
        self.path = path_of(url)
        self._names: dict[str, str] = asdict(collections)
        for name in self._names.values():
            _check_name(name)
        self._quoted = {known: quoted(name) for known, name in self._names.items()}
        self._own = threading.local()
        self._all: dict[threading.Thread, _Kept] = {}
        self._lock = threading.Lock()
        self._generation = 0
        self._reads_only = False

    def open(self, *, create: bool = True) -> None:
        """Make the file, the tables and the indexes that are missing; raises DatabaseFailed.

        Without ``create`` the file is opened for reading only, and what it lacks seems to be there, empty;
        raises DatabaseMissing where there is no file, or no folder that it could be in.
        """
        folder = self.path.parent
        if not folder.is_dir():
            kind = DatabaseFailed if create or folder.exists() else DatabaseMissing
            raise kind(f"{folder} is no folder; make it, or check the path in --database")
        if not create and not self.path.exists():
            raise DatabaseMissing(
                f"there is no {self.path}; enqueue makes it, or check the path in --database"
            )
        if self._reads_only is create:
            self.close()
        self._reads_only = not create
        if create:
            with self._writing() as connection:
                build(connection, self._names)
        else:
            with self._reading():
                pass

    def close(self) -> None:
        """Close all connections, those of other threads as well; a later call opens its own again.

        A connection that another thread is using is closed when that thread has done with it.
        """
        with self._lock:
            self._generation += 1
            kept, self._all = self._all, {}
        for each in kept.values():
            each.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that holds the file's only write lock from its start; undone when the body raises.

        Taken at the start, since a transaction that first reads and then writes fails where another wrote
        in between.
        """
        with self._reading() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """This thread's connection, with SQLite's errors as DatabaseFailed."""
        try:
            kept = self._kept()
            while not kept.take():  # closed by another thread since
                kept = self._kept()
            try:
                yield kept.connection
            finally:
                kept.give_back()
        except (sqlite3.Error, OverflowError, UnicodeEncodeError) as exc:
            raise DatabaseFailed(_sentence(exc, self.path)) from exc

    def _sql(self, template: str, **pieces: str) -> str:
        """The statement: in braces stand tables, by Collections' names, an id, and the pieces given."""
        return template.format_map({**self._quoted, "id": ID, **pieces})

    def _kept(self) -> _Kept:
        """This thread's connection, made where it has none or where all have been closed since."""
        kept: _Kept | None = getattr(self._own, "kept", None)
        if kept is not None and kept.generation == self._generation:
            return kept
        connection = _connect_to_read(self.path, self._names) if self._reads_only else _connect(self.path)
        with self._lock:
            for thread in [each for each in self._all if not each.is_alive()]:
                self._all.pop(thread).close()  # else threads that come and go would use up all open files
            fresh = _Kept(connection, self._generation)
            self._all[threading.current_thread()] = self._own.kept = fresh
        return fresh


def path_of(url: str) -> Path:
    """The file that a URL names; raises ConfigurationError where it names none."""
    _, _, rest = url.partition(":")
    location = unquote(rest.partition("?")[0])
    if not location.startswith("///") or location in {"///", "////"}:
        raise ConfigurationError(
            "write the SQLite file as sqlite:///prompts.db, or sqlite:////data/prompts.db from the root"
        )
    name = location[3:]
    if name == ":memory:":
        raise ConfigurationError("a SQLite database in memory ends with the run; name a file in --database")
    return Path(name)


def _connect(path: Path) -> sqlite3.Connection:
    # In WAL mode readers and the writer do not wait for one another.
    return _prepared(str(path), lambda connection: connection.execute("PRAGMA journal_mode = WAL"))


def _connect_to_read(path: Path, names: Mapping[str, str]) -> sqlite3.Connection:
    def prepare(connection: sqlite3.Connection) -> None:
        overlay(connection, names)
        connection.execute("PRAGMA query_only = ON")

    # Not mode=ro: whoever cannot write cannot take away the files that WAL mode needs beside it either.
    return _prepared(f"{path.absolute().as_uri()}?mode=rw", prepare)


def _prepared(name: str, prepare: Callable[[sqlite3.Connection], object]) -> sqlite3.Connection:
    """A connection, whose transactions begin only when they are told to, prepared."""
    connection = sqlite3.connect(
        name,
        timeout=_PATIENCE,
        isolation_level=None,
        check_same_thread=False,
        uri=name.startswith("file:"),
    )
    try:
        connection.row_factory = sqlite3.Row
        connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        connection.execute(f"PRAGMA cache_size = -{_CACHE}")
        prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_name(name: str) -> None:
    if not name or "\0" in name or name.lower().startswith("sqlite_"):
        raise ConfigurationError(f"{name!r} cannot name a table in SQLite; choose another collection name")


def _sentence(exc: Exception, path: Path) -> str:
    said = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
    code = getattr(exc, "sqlite_errorname", "")
    if code.startswith("SQLITE_NOTADB"):
        return f"{path} is no SQLite database; check the path in --database"
    if code.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return f"{path} cannot be opened for writing ({said}); check its permissions and those of its folder"
    if code.startswith("SQLITE_FULL"):
        return f"{path} cannot grow: the disk is full; make room and run it again"
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return f"{path} was locked by another program for {_PATIENCE} seconds; close it and run it again"
    return f"SQLite file {path}: {said}"
