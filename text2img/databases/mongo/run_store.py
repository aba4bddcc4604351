"""Runs, counts, configurations and new prompts in MongoDB. The contract is Journal's."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from bson.errors import BSONError
from pymongo import UpdateOne
from pymongo.errors import BulkWriteError, PyMongoError

from text2img.databases import Counts, RunTotals, WorkerClaims
from text2img.databases.documents import (
    FAILED_PROMPT_FIELDS,
    FAILURE_FIELDS,
    MADE_FIELDS,
    MODEL_TYPE,
    OUTCOME_FIELDS,
    WEBHOOK_PENDING,
    configuration_of,
    content_of,
    failure_of,
    made_of,
    missing_configuration,
    new_fields,
    run_fields,
    run_of,
)
from text2img.databases.mongo.session import Session, error_message, translate_errors
from text2img.databases.mongo.updates import (
    PROCESSING,
    id_of,
    is_ahead,
    literals,
    other_than,
    selected,
    value_of,
    values_for,
    within,
)
from text2img.errors import DatabaseFailed
from text2img.prompts import Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from text2img.databases import CompletedPrompt, Failure, NewPrompt, Run, Selection
    from text2img.databases.mongo.session import Document
    from text2img.errors import ErrorCode
    from text2img.prompts import ModelConfiguration


_DUPLICATE_KEY: Final = 11000
_AT_ONCE: Final = 1000
_BORN: Final = {
    "$switch": {
        "branches": [
            {"case": {"$eq": [{"$type": "$created_at"}, "date"]}, "then": "$created_at"},
            {"case": {"$eq": [{"$type": "$_id"}, "objectId"]}, "then": {"$toDate": "$_id"}},
        ],
        "default": None,
    }
}
"""When a prompt was written: its ``created_at``, else the time that its ObjectId tells."""
_PICTURES: Final = {
    "$cond": [{"$eq": [{"$type": "$image_urls"}, "array"]}, {"$max": [1, {"$size": "$image_urls"}]}, 1]
}
"""How many pictures a completed prompt has."""


class MongoRunStore(Session):
    """The Journal part of the database; the docstrings of the Protocol hold."""

    @translate_errors
    def model_configuration(self, config_id: str | None) -> ModelConfiguration | None:
        """See Journal.model_configuration. Of several of that type, the one with the smallest ``_id``."""
        wanted: Document = (
            {"model_type": MODEL_TYPE} if config_id is None else {"_id": {"$in": values_for(config_id)}}
        )
        found = self.configurations.find_one(wanted, sort=[("_id", 1)])
        if found is not None:
            return configuration_of(id_of(found.pop("_id")), found)
        if config_id is not None:
            raise missing_configuration(config_id, self.configurations.name)
        return None

    @translate_errors
    def save_run(self, run: Run, lease_seconds: float) -> None:
        """See Journal.save_run."""
        alive = {"lease_expires_at": within(lease_seconds)} if run.status == "running" else {}
        document = {"$literal": {"_id": run.id, **run_fields(run, lease_seconds)}}
        update = [{"$replaceWith": {"$mergeObjects": [document, alive]}}]
        self.runs.update_one({"_id": run.id}, update, upsert=True)

    @translate_errors
    def last_runs(self, limit: int) -> list[Run]:
        """See Journal.last_runs. Documents that are no runs of this job are passed over."""
        found = self.runs.find(sort=[("started_at", -1), ("_id", 1)], limit=limit)
        runs = (run_of(str(id_of(document["_id"])), document) for document in found)
        return [run for run in runs if run is not None]

    @translate_errors
    def run(self, run_id: str) -> Run | None:
        """See Journal.run."""
        document = self.runs.find_one({"_id": {"$eq": run_id}})
        return None if document is None else run_of(run_id, document)

    @translate_errors
    def settled(self, run_id: str) -> RunTotals:
        """See Journal.settled. One command."""
        pictures = {"$cond": [{"$isArray": "$image_urls"}, {"$size": "$image_urls"}, 1]}
        sums = {"n": {"$sum": 1}, "images": {"$sum": pictures}}
        groups = self.datasets.aggregate(
            [{"$match": {"run_id": {"$eq": run_id}}}, {"$group": {"_id": "$status", **sums}}]
        )
        found = {str(group["_id"]): group for group in groups}
        done, failed = (found.get(each.value, {}) for each in (Status.COMPLETED, Status.ERROR))
        return RunTotals(
            completed=int(done.get("n", 0)), failed=int(failed.get("n", 0)), images=int(done.get("images", 0))
        )

    @translate_errors
    def counts(self, selection: Selection) -> Counts:
        """See Journal.counts. One look through the collection; not a snapshot while workers are at it."""
        live = {"$cond": [is_ahead("lease_expires_at"), 1, 0]}
        undelivered, pending_webhooks = (
            {"$cond": [{"$eq": [{"$type": mark}, "missing"]}, 0, 1]}
            for mark in ("$untold", f"${WEBHOOK_PENDING}")
        )
        by = {"status": {"$ifNull": ["$status", Status.PENDING.value]}, "code": "$error_code"}
        sums = {"n": {"$sum": 1}, "live": {"$sum": live}, "untold": {"$sum": undelivered}}
        totals = {
            **sums,
            "owed": {"$sum": pending_webhooks},
            "oldest": {"$min": _BORN},
            "images": {"$sum": _PICTURES},
        }
        groups = self.datasets.aggregate([{"$match": selected(selection)}, {"$group": {"_id": by, **totals}}])
        return _counts(list(groups))

    @translate_errors
    def claims_by_worker(self, selection: Selection) -> list[WorkerClaims]:
        """See Journal.holdings. One command, served by the index."""
        expired = {"$cond": [is_ahead("lease_expires_at"), 0, 1]}
        totals = {"n": {"$sum": 1}, "expired": {"$sum": expired}, "until": {"$max": "$lease_expires_at"}}
        held = {**selected(selection), **PROCESSING}
        groups = self.datasets.aggregate([{"$match": held}, {"$group": {"_id": "$claimed_by", **totals}}])
        return [
            WorkerClaims(
                worker=str(group["_id"] or "unknown"),
                prompts=int(group["n"]),
                expired=int(group["expired"]),
                lease_until=until if isinstance(until := group["until"], datetime) else None,
            )
            for group in groups
        ]

    def enqueue(self, prompts: Iterable[NewPrompt]) -> int:
        """See Journal.enqueue. A thousand at a time, each of them atomic for itself."""
        # Not repeated as a whole after a broken connection: what yields the prompts may do so once only.
        waiting = iter(prompts)
        added = 0
        while chunk := list(islice(waiting, _AT_ONCE)):
            now = datetime.now(UTC)
            added += self._insert(
                [{"_id": value_of(each.id), **new_fields(each), "created_at": now} for each in chunk]
            )
        return added

    def requeue_changed(self, prompts: Iterable[NewPrompt]) -> int:
        """See Journal.revise. A thousand at a time, each of them atomic for itself."""
        waiting = iter(prompts)
        revised = 0
        while chunk := list(islice(waiting, _AT_ONCE)):
            revised += self._revise(chunk)
        return revised

    @translate_errors
    def _revise(self, prompts: Sequence[NewPrompt]) -> int:
        updates = [UpdateOne(other_than(each.id, content_of(each)), _made_of(each)) for each in prompts]
        return self.datasets.bulk_write(updates, ordered=False).matched_count

    @translate_errors
    def retry(self, code: ErrorCode | None, selection: Selection) -> int:
        """See Journal.retry. One command."""
        failed = {**selected(selection), "status": Status.ERROR.value}
        narrowed = failed if code is None else {**failed, "error_code": code.value}
        forgotten = dict.fromkeys((*FAILURE_FIELDS, "untold", WEBHOOK_PENDING, "run_id"), "")
        update = {"$set": {"status": Status.PENDING.value}, "$unset": forgotten}
        return self.datasets.update_many(narrowed, update).matched_count

    @translate_errors
    def _insert(self, documents: list[Document]) -> int:
        try:
            return len(self.datasets.insert_many(documents, ordered=False).inserted_ids)
        except BulkWriteError as exc:
            errors = exc.details["writeErrors"]
            if exc.details["writeConcernErrors"] or any(error["code"] != _DUPLICATE_KEY for error in errors):
                raise
            return int(exc.details["nInserted"])


def _made_of(prompt: NewPrompt) -> list[Document]:
    """The update that makes a prompt as if new of whatever stands in its place."""
    fields = new_fields(prompt)
    gone = {*OUTCOME_FIELDS, *content_of(prompt)} - fields.keys()
    return [{"$set": literals(fields)}, {"$unset": sorted(gone)}]


def _counts(groups: list[Mapping[str, Any]]) -> Counts:
    # By comparison, since an owner's status may be of a type that cannot be a key.
    by_status = {
        status.value: sum(int(group["n"]) for group in groups if group["_id"]["status"] == status)
        for status in Status
    }
    live = sum(int(group["live"]) for group in groups if group["_id"]["status"] == Status.PROCESSING)
    born = [group["oldest"] for group in groups if group["_id"]["status"] == Status.PENDING]
    failed = [group for group in groups if group["_id"]["status"] == Status.ERROR]
    return Counts(
        **by_status,
        live_leases=live,
        expired_leases=by_status[Status.PROCESSING.value] - live,
        oldest_pending=min((moment for moment in born if isinstance(moment, datetime)), default=None),
        undelivered=sum(int(group["untold"]) for group in groups),
        pending_webhooks=sum(int(group["owed"]) for group in groups),
        images=sum(int(group["images"]) for group in groups if group["_id"]["status"] == Status.COMPLETED),
        errors={str(group["_id"].get("code")): int(group["n"]) for group in failed},
    )


_RESULTS_AT_ONCE: Final = 100
"""Documents that one answer of the server brings."""


class MongoResults(Session):
    """The Archive part of the database; the docstrings of the Protocol hold."""

    def made(self, selection: Selection, run_id: str | None = None) -> Iterator[CompletedPrompt]:
        """See Archive.made."""
        found = self._finished(Status.COMPLETED, selection, run_id, MADE_FIELDS)
        return (made_of(*_read(document)) for document in found)

    def failures(self, selection: Selection, run_id: str | None = None) -> Iterator[Failure]:
        """See Archive.failures."""
        found = self._finished(Status.ERROR, selection, run_id, FAILED_PROMPT_FIELDS)
        return (failure_of(*_read(document)) for document in found)

    def _finished(
        self, status: Status, selection: Selection, run_id: str | None, fields: Sequence[str]
    ) -> Iterator[Document]:
        wanted: Document = {"status": status.value, **selected(selection)}
        if run_id is not None:
            wanted["run_id"] = {"$eq": run_id}
        try:
            with self.datasets.find(wanted, ["dataset_id", *fields], batch_size=_RESULTS_AT_ONCE) as cursor:
                yield from cursor
        except (PyMongoError, BSONError, OverflowError, UnicodeEncodeError) as exc:
            raise DatabaseFailed(error_message(exc, self.address, self.name)) from exc


def _read(document: Document) -> tuple[Any, str | None, Document]:
    dataset = document.get("dataset_id")
    return id_of(document["_id"]), None if dataset is None else str(id_of(dataset)), document
