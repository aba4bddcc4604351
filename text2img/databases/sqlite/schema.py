"""The tables and indexes, and how a file that lacks some of them gets them.

No column that an owner writes has a type, so that SQLite converts nothing: the prompts 7 and '7' are two,
and a text where a number belongs is told to its owner.
"""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from text2img.errors import DatabaseFailed
from text2img.prompts import APPROXIMATIONS, PROVIDER_METADATA_FIELDS, PromptId
from text2img.prompts.parameters import PARAMETER_NAMES, RECORDED_NAMES, STYLE_CHECKS

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Container, Mapping


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
        "style_id",
        "created_at",
        # From here on the job's own.
        *("claimed_by", "claim_number", "claim_token", "lease_expires_at", "started_claim", "not_before"),
        *("attempts", "deaths", "image_url", "image_urls", "completed_at", "sha256", "run_id", "used"),
        *("score", "scores", "evaluation", "iterations", "tries", "next_prompt"),
        *("error", "error_code", "error_at", "untold", "webhook_untold"),
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
        *("model", "run_id", "created_at", "prompt_truncated", "claim_number", *APPROXIMATIONS),
        *PROVIDER_METADATA_FIELDS,
    ),
    "runs": (
        _ID,
        *("started_at", "finished_at", "status", "host", "model", "completed", "failed", "images"),
        "postponed",
        *("images_per_second", "steady_images_per_second", "device_busy", "device_busy_of_run"),
        *("peak_memory", "seconds", "versions", "lease_expires_at"),
        *("task_index", "execution"),
        *("gpu_hour_price", "dollars_per_1000_images", "worker", "lease_seconds"),
    ),
    "callbacks": (
        _ID,
        *("run_id", "body", "state", "tries", "not_before", "claimed_by", "lease_expires_at"),
        *("detail", "created_at", "closed_at", "url", "origin"),
    ),
}
STATUS: Final = "COALESCE(status, 'pending')"
URGENCY: Final = "CASE WHEN typeof(priority) IN ('integer', 'real') THEN priority ELSE 0 END"
AHEAD: Final = "COALESCE(typeof({0}) = 'text' AND julianday({0}) > julianday(:now), FALSE)"
"""Whether a column holds a moment that is still to come. Compared as days, since an owner may write it in any
form that SQLite reads; whatever is no moment holds nothing up."""
_INDEXES: Final = {
    "datasets": {
        "claim": f"({STATUS}, {URGENCY} DESC, _id)",
        "untold": "(untold, run_id) WHERE untold IS NOT NULL",
        "owed": "(webhook_untold) WHERE webhook_untold IS NOT NULL",
    },
    "callbacks": {"due": "(state, created_at)"},
    "runs": {"latest": "(started_at DESC)"},
}


def build(connection: sqlite3.Connection, names: Mapping[str, str]) -> None:
    """Make what is missing: tables, columns (an owner's table may have but ``_id`` and ``text``), indexes.

    ``names`` are the tables' names by what Collections calls them. May be repeated. Raises DatabaseFailed for
    a table that is something else.
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
    """Let what is missing seem to be there and empty, for this connection alone: the file stays as it is.

    What is temporary goes before what is in the file under the same name.
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
    """The name as SQL writes an identifier."""
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
"""The kind of an id that is TEXT and yet no UTF-8, as an import in another encoding leaves it: its bytes."""

ID: Final = "COALESCE(CAST(:raw AS TEXT), :id)"
"""A prompt's id in a statement. Python's sqlite3 passes text as UTF-8 alone, so other text goes as bytes."""


def id_of(value: Value) -> PromptId:
    """The prompt id of an ``_id`` as it stands in its column, whatever its type."""
    if isinstance(value, int):
        return PromptId("int", str(value))
    if isinstance(value, float):
        return PromptId("double", repr(value))
    if isinstance(value, bytes):
        return _id_of_bytes(value)
    if value and _is_half(value):
        return PromptId(_TEXT, value.encode("utf-8", "surrogateescape").hex())
    return PromptId("str", value or "")


def value_of(prompt_id: PromptId) -> Value:
    """What stands for the id in a column: 7 and "7" stay two ids, and so does every kind SQLite lacks.

    INTEGER, REAL and TEXT for what fits them, else a BLOB of ``kind:text``.
    """
    kind, text = prompt_id.kind, prompt_id.text
    if kind == "int" and int(text) in _INT64:
        return int(text)
    if kind == "double" and not math.isnan(float(text)):  # SQLite keeps infinity, and NaN as NULL
        return float(text)
    if kind == "blob":
        return bytes.fromhex(text)
    if kind == "str" and not _is_half(text):
        return text
    return f"{kind}:{text}".encode("utf-8", "surrogatepass")


def names_of(prompt_id: PromptId) -> dict[str, Value]:
    """The values that ID names."""
    raw = bytes.fromhex(prompt_id.text) if prompt_id.kind == _TEXT else None
    return {"id": value_of(prompt_id), "raw": raw}


def moment(seconds: float = 0) -> str:
    """The moment ``seconds`` from now, in UTC, as text that sorts by time and that sqlite3's shell shows.

    It is the worker's clock: whoever shares the file shares the machine, and so the clock.
    """
    return text_of(datetime.now(UTC) + timedelta(seconds=seconds))


def text_of(at: datetime) -> str:
    """A moment as it is kept: ISO 8601 in UTC, to the millisecond."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{at.microsecond // 1000:03d}Z"


def datetime_of(value: object) -> datetime | None:
    """The moment that a column holds, or None where it holds none."""
    if not isinstance(value, str):
        return None
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        return None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def columns_of(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields as columns hold them: objects and lists as JSON, moments as text."""
    return {name: _column(value) for name, value in fields.items()}


def object_of(value: object) -> dict[str, object]:
    """The object that a column holds as JSON; empty where it holds none."""
    read = structure_of(value)
    return read if isinstance(read, dict) else {}


def structure_of(value: object) -> object:
    """The object or list that a column holds as JSON; whatever else it holds, as it is."""
    try:
        read = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return value
    return read if isinstance(read, dict | list) else value


def _column(value: object) -> object:
    if isinstance(value, dict | list | tuple):
        return json.dumps(value, ensure_ascii=False)
    return text_of(value) if isinstance(value, datetime) else value


def _is_half(text: str) -> bool:
    """Whether it holds a surrogate: half of a pair, or the stand-in of a byte that is no UTF-8."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def _id_of_bytes(value: bytes) -> PromptId:
    """Bytes that this module wrote are an id of their kind; any others are an id that is bytes."""
    parts = _TAGGED.fullmatch(value)
    if parts:
        try:
            read = PromptId(parts[1].decode(), parts[2].decode("utf-8", "surrogatepass"))
            if value_of(read) == value and read.kind != "blob":
                return read
        except ValueError:  # not UTF-8, or no number: somebody else's bytes
            pass
    return PromptId("blob", value.hex())
