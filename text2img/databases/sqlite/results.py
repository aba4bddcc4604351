"""What was made and what failed, read from SQLite row by row. The contract is Archive's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from text2img.databases.finished_prompts import failure_of, made_of
from text2img.databases.sqlite.codecs import datetime_of, id_of, structure_of
from text2img.databases.sqlite.queue import selected
from text2img.databases.sqlite.schema import STATUS
from text2img.databases.sqlite.session import Session

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

    from text2img.databases import Failure, Made, Selection

_FINISHED: Final = (
    "SELECT * FROM {datasets} WHERE {status} = :status AND {where} AND (:run IS NULL OR run_id = :run)"
)
_STRUCTURES: Final = ("prompt_tags", "image_urls", "used", "scores", "evaluation", "tries")
_MOMENTS: Final = ("completed_at", "error_at")


class SqliteArchive(Session):
    """The Archive part of the database; the docstrings of the Protocol hold.

    What is read is what stood there at the start: in WAL mode it holds up no writer.
    """

    def made(self, selection: Selection, run_id: str | None = None) -> Iterator[Made]:
        """See Archive.made."""
        return (made_of(*_read(row)) for row in self._finished("completed", selection, run_id))

    def failures(self, selection: Selection, run_id: str | None = None) -> Iterator[Failure]:
        """See Archive.failures."""
        return (failure_of(*_read(row)) for row in self._finished("error", selection, run_id))

    def _finished(self, status: str, selection: Selection, run_id: str | None) -> Iterator[sqlite3.Row]:
        where, values = selected(selection)
        statement = self._sql(_FINISHED, status=STATUS, where=where)
        with self._reading() as connection:
            yield from connection.execute(statement, {**values, "status": status, "run": run_id})


def _read(row: sqlite3.Row) -> tuple[Any, str | None, dict[str, Any]]:
    fields: dict[str, Any] = dict(row)
    fields |= {name: structure_of(fields.get(name)) for name in _STRUCTURES}
    fields |= {name: datetime_of(fields.get(name)) for name in _MOMENTS}
    dataset = fields["dataset_id"]
    return id_of(fields["_id"]), None if dataset is None else str(id_of(dataset)), fields
