"""Prompts and results in one SQLite file, for one machine, through the Protocols of text2img.databases.

The tables can be filled and read in the sqlite3 shell. Network file systems do not work: their locks are
unreliable.
"""

from __future__ import annotations

import atexit
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from text2img.errors import ConfigurationError, DatabaseMissing

if TYPE_CHECKING:
    from collections.abc import Callable

_BUSY_TIMEOUT: Final = 15
"""Seconds to wait for other writers; each locks the file for milliseconds."""
_CACHE_KIB: Final = 256
"""Cache of each thread's connection; the operating system caches the file for all of them."""


def check_folder(path: Path) -> None:
    """Raise DatabaseMissing if the file's folder does not exist."""
    if not path.parent.is_dir():
        raise DatabaseMissing(f"{path.parent} is not a folder; create it, or check the path in --database")


def check_file(path: Path) -> None:
    """Raise DatabaseMissing if the file does not exist."""
    if not path.exists():
        raise DatabaseMissing(f"{path} does not exist; create it by enqueue, or check the path in --database")


def check_exists(url: str) -> None:
    """Raise DatabaseMissing if a database's URL names a file that does not exist."""
    if folder_of(url) is not None:
        path = path_of(url)
        check_folder(path)
        check_file(path)


def folder_of(url: str) -> Path | None:
    """Return the absolute folder of the file that a database's URL names; None for a server."""
    is_file = url.partition(":")[0].lower() == "sqlite"
    return path_of(url).absolute().parent if is_file else None


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


def connect(path: Path) -> sqlite3.Connection:
    """Open a connection that writes, in WAL mode: readers and the writer do not block each other."""
    return prepared(str(path), lambda connection: connection.execute("PRAGMA journal_mode = WAL"))


def connect_to_read(path: Path, prepare: Callable[[sqlite3.Connection], object]) -> sqlite3.Connection:
    """Open a connection that only reads, also where neither the file nor its folder can be written.

    Such a file is not being written to either: it is read as it is. If a writer was killed before it
    moved its last changes from the WAL into the file, a copy of both is read.
    """
    uri = path.absolute().as_uri()
    try:
        # Not mode=ro: a read-only connection could not delete the files that WAL mode needs.
        return prepared(f"{uri}?mode=rw", prepare)
    except sqlite3.OperationalError as exc:
        code = getattr(exc, "sqlite_errorname", "")
        if not code.startswith(_NOT_WRITABLE):
            raise
        wal = path.with_name(f"{path.name}-wal")
        if not wal.exists() or not wal.stat().st_size:
            return prepared(f"{uri}?mode=ro&immutable=1", prepare)
        folder = Path(tempfile.mkdtemp(prefix="text2img-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for file in (path, wal):
            shutil.copyfile(file, folder / file.name)
        return prepared(f"{(folder / path.name).as_uri()}?mode=rw", prepare)


def prepared(name: str, prepare: Callable[[sqlite3.Connection], object]) -> sqlite3.Connection:
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


_NOT_WRITABLE: Final = ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")


def error_message(exc: Exception, path: Path) -> str:
    """Return the message of a failed statement: what is wrong with the file, and what to do."""
    message = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
    code = getattr(exc, "sqlite_errorname", "")
    if code.startswith("SQLITE_NOTADB"):
        return f"{path} is not a SQLite database; check the path in --database"
    if code.startswith(_NOT_WRITABLE):
        return f"cannot open {path} for writing ({message}); check its permissions and those of its folder"
    if code.startswith("SQLITE_FULL"):
        return f"cannot write {path}: the disk is full; free some space and run it again"
    if code.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return f"another program locked {path} for {_BUSY_TIMEOUT} seconds; close it and run it again"
    return f"SQLite file {path}: {message}"
