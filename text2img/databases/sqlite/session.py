"""An open SQLite file: its tables, one connection per thread, transactions, and the conversion of values.

Columns that an owner writes have no type, so that SQLite converts nothing: the ids 7 and '7' stay different,
and a text in place of a number is reported to the owner.
"""

from __future__ import annotations

import json
import math
import re
import sqlite3
import threading
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from text2img.databases.sqlite import (
    check_file,
    check_folder,
    connect,
    connect_to_read,
    error_message,
    path_of,
    prepared,
)
from text2img.errors import ConfigurationError, DatabaseFailed, WritesRejected
from text2img.prompts import APPROXIMATIONS, PROVIDER_METADATA_FIELDS, PromptId
from text2img.prompts.parameters import PARAMETER_NAMES, RECORDED_NAMES, STYLE_CHECKS

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping
    from pathlib import Path

    from text2img.databases import Collections


_ID: Final = "_id NOT NULL PRIMARY KEY"
TABLES: Final[dict[str, tuple[str, ...]]] = {
    "datasets": (
        _ID,
        "text",
        "prompt_tags",
        "status DEFAULT 'pending'",
        "dataset_id",
        *PARAMETER_NAMES,
        "priority",
        "webhook_url",
        *("style_id", "created_at"),
        # The columns from here on are written by the job.
        "input_file",
        *("claimed_by", "claim_number", "claim_token", "lease_expires_at", "started_claim", "not_before"),
        *("attempts", "deaths", "image_url", "image_urls", "completed_at", "sha256", "run_id", "used"),
        *("sha256s", "score", "scores", "evaluation", "iterations", "tries", "next_prompt"),
        *("unscored_images", "error", "error_code", "error_at"),
        *("untold", "webhook_untold", "webhook_message_id"),
    ),
    "model_configs": (
        _ID,
        "model_type DEFAULT 'stable_diffusion'",
        *("model_path", "revision", "variant", "scheduler", "num_inference_steps", "guidance_scale"),
        *(
            "width",
            "height",
            "aspect_ratio",
            "num_images",
            "lora",
            "negative_prompt",
            "true_cfg_scale",
            *STYLE_CHECKS,
            "safety_checker",
            *APPROXIMATIONS,
        ),
    ),
    "dataset_records": (
        "dataset_id NOT NULL PRIMARY KEY",
        *("prompt", "image_url", "image_urls", "gcs_url", "status", "score", "scores", "evaluation"),
        *("iterations", "tries", "refined_prompt"),
        *RECORDED_NAMES,
        *("model", "model_base", "run_id", "created_at", "prompt_truncated", "claim_number", *APPROXIMATIONS),
        *PROVIDER_METADATA_FIELDS,
    ),
    "runs": (
        _ID,
        *("started_at", "finished_at", "status", "host", "model", "completed", "failed", "images"),
        "postponed",
        *("images_per_second", "steady_images_per_second", "device_busy", "device_busy_of_run"),
        *("peak_memory", "seconds", "versions", "lease_expires_at"),
        *("task_index", "execution"),
        *("gpu_hour_price", "dollars_per_1000_images", "worker", "lease_seconds", "tries", "resumed_at"),
    ),
    "callbacks": (
        _ID,
        *("run_id", "body", "state", "tries", "not_before", "claimed_by", "lease_expires_at"),
        *("detail", "created_at", "closed_at", "url", "origin"),
    ),
}
STATUS: Final = "COALESCE(status, 'pending')"
PRIORITY: Final = "CASE WHEN typeof(priority) IN ('integer', 'real') THEN priority ELSE 0 END"
IN_FUTURE: Final = "COALESCE(typeof({0}) = 'text' AND julianday({0}) > julianday(:now), FALSE)"
"""True if a column holds a time in the future. Compared as days, since an owner may write it in any form that
SQLite reads; a value that is not a time delays nothing."""
_INDEXES: Final = {
    "datasets": {
        "claim": f"({STATUS}, {PRIORITY} DESC, _id)",
        "untold": "(untold, run_id) WHERE untold IS NOT NULL",
        "owed": "(webhook_untold) WHERE webhook_untold IS NOT NULL",
    },
    "callbacks": {"due": "(state, created_at)"},
    "runs": {"latest": "(started_at DESC)"},
}


def create_missing(connection: sqlite3.Connection, names: Mapping[str, str]) -> None:
    """Create the missing tables, columns and indexes; an owner's table needs only ``_id`` and ``text``.

    ``names`` maps the fields of Collections to the tables' names. May be repeated. Raises DatabaseFailed for
    a table without its key column.
    """
    for table, columns in TABLES.items():
        name = quoted(names[table])
        connection.execute(f"CREATE TABLE IF NOT EXISTS {name} ({', '.join(columns)})")
        present = {row[1] for row in connection.execute(f"PRAGMA table_info({name})")}
        _check_identity(names[table], columns[0], present)
        for column in columns[1:]:
            if column.split()[0] not in present:
                connection.execute(f"ALTER TABLE {name} ADD COLUMN {column}")
        for purpose, on in _INDEXES.get(table, {}).items():
            index = quoted(f"{names[table]}_{purpose}")
            connection.execute(f"CREATE INDEX IF NOT EXISTS {index} ON {name} {on}")


def overlay(connection: sqlite3.Connection, names: Mapping[str, str]) -> None:
    """Simulate missing tables and columns as empty, for this connection only; the file is not changed.

    SQLite resolves a temporary table or view before the file's table of the same name.
    """
    for table, columns in TABLES.items():
        name = quoted(names[table])
        present = [row[1] for row in connection.execute(f"PRAGMA main.table_info({name})")]
        if not present:
            connection.execute(f"CREATE TEMP TABLE {name} ({', '.join(columns)})")
            continue
        _check_identity(names[table], columns[0], present)
        missing = [column.split()[0] for column in columns if column.split()[0] not in present]
        if missing:
            empty = ", ".join(f"NULL AS {column}" for column in missing)
            view = "CREATE TEMP VIEW {name} AS SELECT *, {empty} FROM main.{name}"
            connection.execute(view.format(name=name, empty=empty))


def quoted(name: str) -> str:
    """Return the name as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def _check_identity(name: str, column: str, present: Container[str]) -> None:
    identity = column.partition(" ")[0]
    if identity not in present:
        raise DatabaseFailed(
            f"table {name} has no column {identity}; rename it, or choose another table name"
        )


Value = int | float | str | bytes | None

_INT64: Final = range(-(2**63), 2**63)
_TAGGED: Final = re.compile(rb"([a-z]+):(.*)", re.DOTALL)
_TEXT: Final = "text"
"""The kind of an id that is TEXT but not valid UTF-8, as left by an import in another encoding."""

ID: Final = "COALESCE(CAST(:raw AS TEXT), :id)"
"""A prompt's id in a statement. Python's sqlite3 passes text only as UTF-8, so other text goes as bytes."""


def id_of(value: Value) -> PromptId:
    """Return the prompt id of the value of an ``_id`` column, of any type."""
    if isinstance(value, int):
        return PromptId("int", str(value))
    if isinstance(value, float):
        return PromptId("double", repr(value))
    if isinstance(value, bytes):
        return _id_of_bytes(value)
    if value and _has_surrogate(value):
        return PromptId(_TEXT, value.encode("utf-8", "surrogateescape").hex())
    return PromptId("str", value or "")


def value_of(prompt_id: PromptId) -> Value:
    """Return the column value of an id: INTEGER, REAL or TEXT if it fits, else a BLOB of ``kind:text``.

    So 7 and "7" stay different ids, and so do ids of kinds that SQLite lacks.
    """
    kind, text = prompt_id.kind, prompt_id.text
    if kind == "int" and int(text) in _INT64:
        return int(text)
    if kind == "double" and not math.isnan(float(text)):  # SQLite stores infinity, but NaN as NULL
        return float(text)
    if kind == "blob":
        return bytes.fromhex(text)
    if kind == "str" and not _has_surrogate(text):
        return text
    return f"{kind}:{text}".encode("utf-8", "surrogatepass")


def names_of(prompt_id: PromptId) -> dict[str, Value]:
    """Return the values of the parameters in ID."""
    raw = bytes.fromhex(prompt_id.text) if prompt_id.kind == _TEXT else None
    return {"id": value_of(prompt_id), "raw": raw}


def timestamp(seconds: float = 0) -> str:
    """Return the time ``seconds`` from now, in UTC, as text that sorts by time and that SQLite can read.

    It uses the worker's clock: workers that share the file share the machine, and so the clock.
    """
    return text_of(datetime.now(UTC) + timedelta(seconds=seconds))


def text_of(at: datetime) -> str:
    """Return a time as it is stored: ISO 8601 in UTC, to the millisecond."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"


def datetime_of(value: object) -> datetime | None:
    """Return the time in a column, or None if it holds none."""
    if not isinstance(value, str):
        return None
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def columns_of(fields: Mapping[str, object]) -> dict[str, object]:
    """Return the fields as column values: objects and lists as JSON, times as text."""
    return {name: _column(value) for name, value in fields.items()}


def object_of(value: object) -> dict[str, object]:
    """Return the JSON object in a column; empty if it holds none."""
    parsed = structure_of(value)
    return parsed if isinstance(parsed, dict) else {}


def structure_of(value: object) -> object:
    """Return the JSON object or list in a column; any other value unchanged."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict | list) else value


def _column(value: object) -> object:
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False)
    return text_of(value) if isinstance(value, datetime) else value


def _has_surrogate(text: str) -> bool:
    """Return True if it holds a lone surrogate, or the surrogate of a byte that is not UTF-8."""
    return len(text.encode("utf-8", "ignore").decode()) < len(text)  # in C: an id may be as long as a row


def _id_of_bytes(value: bytes) -> PromptId:
    """Return the id of a BLOB: of the kind in its tag if ``value_of`` wrote it, else of kind ``blob``."""
    parts = _TAGGED.fullmatch(value)
    if parts:
        try:
            tagged = PromptId(parts[1].decode(), parts[2].decode("utf-8", "surrogatepass"))
            if value_of(tagged) == value and tagged.kind != "blob":
                return tagged
        except ValueError:  # not UTF-8, or not a number: not written by value_of
            pass
    return PromptId("blob", value.hex())


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
        check_folder(self.path)
        if not create:
            check_file(self.path)
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
    def rehearsing(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction for a body that undoes what it writes.

        Without ``create`` the missing tables are made within it, and all of it is rolled back.
        """
        if not self._read_only:
            with self.writing() as connection:
                yield connection
            return
        try:
            connection = prepared(f"{self.path.absolute().as_uri()}?mode=rw", lambda _: None)
            try:
                connection.execute("BEGIN IMMEDIATE")
                create_missing(connection, self.names)
                yield connection
            finally:
                with suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                connection.close()
        except sqlite3.Error as exc:
            raise DatabaseFailed(error_message(exc, self.path)) from exc

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
            raise DatabaseFailed(error_message(exc, self.path)) from exc

    def sql(self, template: str, **pieces: str) -> str:
        """Format a statement: braces name tables (as in Collections), ``id``, and the given pieces."""
        return template.format_map({**self._quoted, "id": ID, **pieces})

    def _own_connection(self) -> _ThreadConnection:
        """Return this thread's connection; open one if it has none or if all have been closed since."""
        own: _ThreadConnection | None = getattr(self._local, "connection", None)
        if own is not None and own.generation == self._generation:
            return own
        connection = _connect_to_read(self.path, self.names) if self._read_only else connect(self.path)
        with self._lock:
            for dead in [thread for thread in self._connections if not thread.is_alive()]:
                self._connections.pop(dead).close()  # else short-lived threads would exhaust the open files
            opened = _ThreadConnection(connection, self._generation)
            self._connections[threading.current_thread()] = self._local.connection = opened
        return opened


def _connect_to_read(path: Path, names: Mapping[str, str]) -> sqlite3.Connection:
    def prepare(connection: sqlite3.Connection) -> None:
        overlay(connection, names)
        connection.execute("PRAGMA query_only = ON")

    return connect_to_read(path, prepare)


def _check_name(name: str) -> None:
    if not name or "\0" in name or name.lower().startswith("sqlite_"):
        raise ConfigurationError(f"{name!r} is not a valid SQLite table name; choose another collection name")


REJECTIONS: Final = (sqlite3.IntegrityError, sqlite3.DataError, OverflowError, UnicodeEncodeError)
"""The errors with which a row rejects a write: by a CHECK, a trigger, or a value that does not fit."""
_UNIQUE: Final = frozenset({"SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY"})


def reason_of(exc: Exception) -> str:
    """Return why a row rejected a write, in one line; raise WritesRejected if a unique index is the cause.

    Such an index would reject other rows as well.
    """
    if getattr(exc, "sqlite_errorname", "") in _UNIQUE:
        raise WritesRejected(
            f"a unique index of another program rejects what this job writes ({exc}); "
            "drop it or make it partial, or name another collection"
        ) from exc
    return str(exc).partition("\n")[0][:300] or type(exc).__name__
