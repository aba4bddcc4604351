"""What was made and what failed, read from MongoDB by a cursor. The contract is Archive's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from bson.errors import BSONError
from pymongo.errors import PyMongoError

from text2img.databases.finished_prompts import FAILURE_FIELDS, MADE_FIELDS, failure_of, made_of
from text2img.databases.mongo.connection import sentence
from text2img.databases.mongo.ids import id_of
from text2img.databases.mongo.session import Session
from text2img.databases.mongo.updates import selected
from text2img.errors import DatabaseFailed
from text2img.prompts import Status

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from text2img.databases import Failure, Made, Selection
    from text2img.databases.mongo.connection import Document

_AT_ONCE: Final = 100
"""Documents that one answer of the server brings."""


class MongoArchive(Session):
    """The Archive part of the database; the docstrings of the Protocol hold."""

    def made(self, selection: Selection, run_id: str | None = None) -> Iterator[Made]:
        """See Archive.made."""
        found = self._finished(Status.COMPLETED, selection, run_id, MADE_FIELDS)
        return (made_of(*_read(document)) for document in found)

    def failures(self, selection: Selection, run_id: str | None = None) -> Iterator[Failure]:
        """See Archive.failures."""
        found = self._finished(Status.ERROR, selection, run_id, FAILURE_FIELDS)
        return (failure_of(*_read(document)) for document in found)

    def _finished(
        self, status: Status, selection: Selection, run_id: str | None, fields: Sequence[str]
    ) -> Iterator[Document]:
        wanted: Document = {"status": status.value, **selected(selection)}
        if run_id is not None:
            wanted["run_id"] = {"$eq": run_id}
        try:
            with self.datasets.find(wanted, ["dataset_id", *fields], batch_size=_AT_ONCE) as cursor:
                yield from cursor
        except (PyMongoError, BSONError, OverflowError, UnicodeEncodeError) as exc:
            raise DatabaseFailed(sentence(exc, self.address, self.name)) from exc


def _read(document: Document) -> tuple[Any, str | None, Document]:
    dataset = document.get("dataset_id")
    return id_of(document["_id"]), None if dataset is None else str(id_of(dataset)), document
