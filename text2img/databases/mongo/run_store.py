"""Runs, counts, configurations, new prompts and results in MongoDB; implements RunStore and Results."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from bson.errors import BSONError
from pymongo import UpdateOne
from pymongo.errors import BulkWriteError, DocumentTooLarge, DuplicateKeyError, PyMongoError

from text2img.databases import Counts, RunTotals, StoredPrompt, WorkerClaims
from text2img.databases.documents import (
    COMPLETED_FIELDS,
    CONTENT_FIELDS,
    FAILED_PROMPT_FIELDS,
    FAILURE_FIELDS,
    MODEL_TYPE,
    OUTCOME_FIELDS,
    WEBHOOK_ID,
    WEBHOOK_PENDING,
    completed_prompt,
    configuration_of,
    content_of,
    failed_prompt,
    merged_counts,
    missing_configuration,
    new_fields,
    rejected_prompt,
    stored_content,
)
from text2img.databases.mongo.session import (
    DUPLICATE_KEY,
    NO_INDEX,
    Session,
    error_message,
    index_of,
    reason_of,
    translate_errors,
)
from text2img.databases.mongo.updates import (
    CLAIMABLE,
    DUE,
    EXPIRED,
    PENDING,
    PROCESSING,
    differs,
    from_now,
    id_of,
    in_future,
    literals,
    selected,
    value_of,
    values_for,
)
from text2img.databases.outcome_updates import score_fields
from text2img.databases.run_documents import MAX_SKIPPED_RUNS, run_fields, run_of
from text2img.errors import DatabaseFailed
from text2img.prompts import Status

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

    from text2img.databases import CompletedPrompt, Failure, NewPrompt, Run, Selection
    from text2img.databases.mongo.session import Document
    from text2img.errors import ErrorCode
    from text2img.prompts import ModelConfiguration, PromptId


_BATCH_SIZE: Final = 1000
_CREATED_AT: Final = {
    "$switch": {
        "branches": [
            {"case": {"$eq": [{"$type": "$created_at"}, "date"]}, "then": "$created_at"},
            {"case": {"$eq": [{"$type": "$_id"}, "objectId"]}, "then": {"$toDate": "$_id"}},
        ],
        "default": None,
    }
}
"""The time a prompt was created: its ``created_at``, else the time in its ObjectId."""
_IMAGES: Final = {
    "$cond": [{"$eq": [{"$type": "$image_urls"}, "array"]}, {"$max": [1, {"$size": "$image_urls"}]}, 1]
}
"""The number of images of a completed prompt."""


class MongoRunStore:
    """The RunStore part of the database, documented by the Protocol."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._datasets, self._configurations, self._runs = (
            session.datasets,
            session.configurations,
            session.runs,
        )

    @translate_errors
    def model_configuration(self, config_id: str | None) -> ModelConfiguration | None:
        """See RunStore.model_configuration. Among several of that type, the smallest ``_id`` wins."""
        matching: Document = (
            {"model_type": MODEL_TYPE} if config_id is None else {"_id": {"$in": values_for(config_id)}}
        )
        found = self._configurations.find_one(matching, sort=[("_id", 1)])
        if found is not None:
            return configuration_of(id_of(found.pop("_id")), found)
        if config_id is not None:
            raise missing_configuration(config_id, self._configurations.name)
        return None

    @translate_errors
    def begin_run(self, run: Run, lease_seconds: float, replaces: str | None = None) -> bool:
        """See RunStore.begin_run. The unique ``_id`` decides between two that begin at once."""
        mine = [run.worker, *([replaces] if replaces else [])]
        free = {"$or": [{"status": {"$ne": "running"}}, {"worker": {"$in": mine}}, EXPIRED]}
        update = _saved(run, lease_seconds)
        if self._runs.update_one({"_id": run.id, **free}, update).matched_count:
            return True
        try:  # no filter with $expr: it cannot be used for an upsert
            new = {"_id": run.id, "status": {"$exists": False}}
            self._runs.update_one(new, update, upsert=True)
        except DuplicateKeyError:
            return False
        return True

    @translate_errors
    def save_run(self, run: Run, lease_seconds: float) -> None:
        """See RunStore.save_run."""
        self._runs.update_one({"_id": run.id}, _saved(run, lease_seconds), upsert=True)

    @translate_errors
    def last_runs(self, limit: int) -> list[Run]:
        """See RunStore.last_runs. Documents that are not runs of this job are skipped."""
        found = self._runs.find(sort=[("started_at", -1), ("_id", 1)], limit=limit + MAX_SKIPPED_RUNS)
        runs = (run_of(str(id_of(document["_id"])), document) for document in found)
        return list(islice((run for run in runs if run is not None), limit))

    @translate_errors
    def run(self, run_id: str) -> Run | None:
        """See RunStore.run."""
        document = self._runs.find_one({"_id": {"$eq": run_id}})
        return None if document is None else run_of(run_id, document)

    @translate_errors
    def run_totals(self, run_id: str) -> RunTotals:
        """See RunStore.run_totals. One command."""
        images = {"$cond": [{"$isArray": "$image_urls"}, {"$size": "$image_urls"}, 1]}
        sums = {"n": {"$sum": 1}, "images": {"$sum": images}}
        groups = self._datasets.aggregate(
            [{"$match": {"run_id": {"$eq": run_id}}}, {"$group": {"_id": "$status", **sums}}]
        )
        found = {str(group["_id"]): group for group in groups}
        done, failed = (found.get(status.value, {}) for status in (Status.COMPLETED, Status.ERROR))
        return RunTotals(
            completed=int(done.get("n", 0)), failed=int(failed.get("n", 0)), images=int(done.get("images", 0))
        )

    @translate_errors
    def counts(self, selection: Selection) -> Counts:
        """See RunStore.counts. One scan of the collection; not a snapshot while workers write."""
        live = {"$cond": [in_future("lease_expires_at"), 1, 0]}
        undelivered, pending_webhooks = (
            {"$cond": [{"$eq": [{"$type": mark}, "missing"]}, 0, 1]}
            for mark in ("$untold", f"${WEBHOOK_PENDING}")
        )
        by = {"status": {"$ifNull": ["$status", Status.PENDING.value]}, "code": "$error_code"}
        sums = {"n": {"$sum": 1}, "live": {"$sum": live}, "untold": {"$sum": undelivered}}
        totals = {
            **sums,
            "owed": {"$sum": pending_webhooks},
            "oldest": {"$min": _CREATED_AT},
            "images": {"$sum": _IMAGES},
        }
        groups = self._datasets.aggregate(
            [{"$match": selected(selection)}, {"$group": {"_id": by, **totals}}]
        )
        return _counts(list(groups))

    @translate_errors
    def claims_by_worker(self, selection: Selection) -> list[WorkerClaims]:
        """See RunStore.claims_by_worker. One command, served by the index."""
        expired = {"$cond": [in_future("lease_expires_at"), 0, 1]}
        totals = {"n": {"$sum": 1}, "expired": {"$sum": expired}, "until": {"$max": "$lease_expires_at"}}
        held = {**selected(selection), **PROCESSING}
        groups = self._datasets.aggregate([{"$match": held}, {"$group": {"_id": "$claimed_by", **totals}}])
        return [
            WorkerClaims(
                worker=str(group["_id"] or "unknown"),
                prompts=int(group["n"]),
                expired=int(group["expired"]),
                lease_until=until if isinstance(until := group["until"], datetime) else None,
            )
            for group in groups
        ]

    def enqueue(
        self, prompts: Iterable[NewPrompt], input_file: str | None = None, *, restore: bool = True
    ) -> int:
        """See RunStore.enqueue. In batches of 1,000, each prompt atomic by itself."""
        # Not repeated as a whole when the connection breaks: an iterator yields its prompts only once.
        remaining = iter(prompts)
        added = 0
        while batch := list(islice(remaining, _BATCH_SIZE)):
            now = datetime.now(UTC)
            documents = [
                {"_id": value_of(prompt.id), **new_fields(prompt, input_file), "created_at": now}
                for prompt in batch
            ]
            inserted = self._insert(documents)
            added += inserted
            if restore and inserted < len(batch):
                added += self._restore(batch, input_file)
        return added

    @translate_errors
    def _restore(self, prompts: Sequence[NewPrompt], input_file: str | None) -> int:
        """Make the removed ones pending as if new; without a file, let known ones forget theirs."""
        by_id = {"_id": {"$in": [value_of(prompt.id) for prompt in prompts]}}
        removed = {"status": Status.REMOVED.value}
        found = {id_of(each["_id"]) for each in self._datasets.find({**by_id, **removed}, {"_id": 1})}
        updates = [
            UpdateOne({"_id": {"$eq": value_of(new.id)}, **removed}, _replaced_by(new, input_file))
            for new in prompts
            if new.id in found
        ]
        restored = self._datasets.bulk_write(updates, ordered=False).matched_count if updates else 0
        if input_file is None:
            of_file = {**by_id, "input_file": {"$exists": True}}
            self._datasets.update_many(of_file, {"$unset": {"input_file": ""}})
        return restored

    @translate_errors
    def compare(self, prompts: Sequence[NewPrompt], selection: Selection) -> list[StoredPrompt | None]:
        """See RunStore.compare. Two commands for 1,000 prompts."""
        remaining = iter(prompts)
        compared: list[StoredPrompt | None] = []
        while batch := list(islice(remaining, _BATCH_SIZE)):
            by_id = {"_id": {"$in": [value_of(prompt.id) for prompt in batch]}}
            leased = {"$and": [{"$eq": ["$status", Status.PROCESSING.value]}, in_future("lease_expires_at")]}
            content = dict.fromkeys(content_of(batch[0]), 1)
            shown = {**content, "status": 1, "held": leased}
            stored = {
                id_of(each["_id"]): each
                for each in self._datasets.aggregate([{"$match": by_id}, {"$project": shown}])
            }
            claimable = {"$and": [by_id, selected(selection), CLAIMABLE]}
            waiting = {id_of(each["_id"]) for each in self._datasets.find(claimable, {"_id": 1})}
            compared += [
                _compared(new, stored[new.id], waiting=new.id in waiting) if new.id in stored else None
                for new in batch
            ]
        return compared

    @translate_errors
    def left_file(
        self, input_file: str, kept: Container[PromptId], selection: Selection | None = None
    ) -> list[PromptId]:
        """See RunStore.left_file. One query, served by the index on the status."""
        matching: Document = {**PENDING, "input_file": {"$eq": input_file}}
        if selection is not None:
            matching = {"$and": [matching, DUE, selected(selection)]}
        found = (id_of(each["_id"]) for each in self._datasets.find(matching, {"_id": 1}))
        return [prompt_id for prompt_id in found if prompt_id not in kept]

    @translate_errors
    def remove(self, prompt_ids: Sequence[PromptId], input_file: str) -> int:
        """See RunStore.remove. In batches of 1,000, each prompt atomic by itself."""
        removed = 0
        for start in range(0, len(prompt_ids), _BATCH_SIZE):
            values = [value_of(prompt_id) for prompt_id in prompt_ids[start : start + _BATCH_SIZE]]
            matching = {"_id": {"$in": values}, **PENDING, "input_file": {"$eq": input_file}}
            update = {"$set": {"status": Status.REMOVED.value}}
            removed += self._datasets.update_many(matching, update).modified_count
        return removed

    @translate_errors
    def stored(self, ids: Sequence[PromptId]) -> dict[PromptId, NewPrompt | None]:
        """See RunStore.stored. One command."""
        known = {"_id": {"$in": [value_of(prompt_id) for prompt_id in ids]}}
        found = self._datasets.find(known, dict.fromkeys(CONTENT_FIELDS, 1))
        return {(each := id_of(document["_id"])): stored_content(each, document) for document in found}

    def requeue_changed(self, prompts: Iterable[NewPrompt]) -> int:
        """See RunStore.requeue_changed. In batches of 1,000, each prompt atomic by itself."""
        remaining = iter(prompts)
        requeued = 0
        while batch := list(islice(remaining, _BATCH_SIZE)):
            requeued += self._requeue_changed(batch)
        return requeued

    @translate_errors
    def _requeue_changed(self, prompts: Sequence[NewPrompt]) -> int:
        updates = [UpdateOne(differs(new.id, content_of(new)), _replaced_by(new)) for new in prompts]
        return self._datasets.bulk_write(updates, ordered=False).matched_count

    @translate_errors
    def save_scores(
        self, prompt: CompletedPrompt, scores: Sequence[float | None], evaluation: Mapping[str, object]
    ) -> bool:
        """See RunStore.save_scores. The result first: until the prompt has its scores, it is scored again."""
        update = {"$set": score_fields(scores, evaluation)}
        name, url = {"$eq": value_of(prompt.id)}, {"$eq": prompt.image_urls[0]}
        self.session.records.update_one({"dataset_id": name, "image_url": url}, update)
        same = {"_id": name, "status": Status.COMPLETED.value, "image_url": url}
        return self._datasets.update_one(same, update).matched_count > 0

    @translate_errors
    def retry(self, code: ErrorCode | None, selection: Selection) -> int:
        """See RunStore.retry. One command."""
        failed = {**selected(selection), "status": Status.ERROR.value}
        matching = failed if code is None else {**failed, "error_code": code.value}
        removed = dict.fromkeys((*FAILURE_FIELDS, "untold", WEBHOOK_PENDING, WEBHOOK_ID, "run_id"), "")
        update = {"$set": {"status": Status.PENDING.value}, "$unset": removed}
        return self._datasets.update_many(matching, update).matched_count

    @translate_errors
    def _insert(self, documents: list[Document]) -> int:
        try:
            return len(self._datasets.insert_many(documents, ordered=False).inserted_ids)
        except BulkWriteError as exc:
            if exc.details["writeConcernErrors"]:
                raise
            for error in exc.details["writeErrors"]:
                if reason := self._rejection(error):
                    raise rejected_prompt(id_of(documents[error["index"]]["_id"]), reason) from exc
            return int(exc.details["nInserted"])
        except (DocumentTooLarge, BSONError, OverflowError, UnicodeEncodeError) as exc:
            # Raised before anything is sent: one document spoils all that are sent with it.
            if len(documents) == 1:
                raise rejected_prompt(id_of(documents[0]["_id"]), str(exc)) from exc
            return sum(self._insert([document]) for document in documents)

    def _rejection(self, error: Mapping[str, Any]) -> str | None:
        """Return why a document was rejected; None if its id exists. Raises other errors."""
        if error["code"] != DUPLICATE_KEY:
            return reason_of(error, self._datasets.name)
        index = index_of(error)
        return None if index == NO_INDEX or index.startswith("_id") else f"the unique index {index}"


def _compared(new: NewPrompt, stored: Mapping[str, Any], *, waiting: bool) -> StoredPrompt:
    content = content_of(new)
    return StoredPrompt(
        removed=stored.get("status") == Status.REMOVED,
        # As MongoDB compares: 7 and 7.0 are equal, 1 and true are not.
        differs=any(
            stored.get(name) != value or isinstance(stored.get(name), bool) for name, value in content.items()
        ),
        held=bool(stored.get("held")),
        waiting=waiting,
    )


def _saved(run: Run, lease_seconds: float) -> list[Document]:
    """Return the update that replaces a run's document."""
    lease = {"lease_expires_at": from_now(lease_seconds)} if run.status == "running" else {}
    document = {"$literal": {"_id": run.id, **run_fields(run, lease_seconds)}}
    return [{"$replaceWith": {"$mergeObjects": [document, lease]}}]


def _replaced_by(prompt: NewPrompt, input_file: str | None = None) -> list[Document]:
    """Return the update that replaces a stored prompt by a new one."""
    fields = new_fields(prompt, input_file)
    removed = {*OUTCOME_FIELDS, *content_of(prompt)} - fields.keys()
    return [{"$set": literals(fields)}, {"$unset": sorted(removed)}]


def _counts(groups: list[Mapping[str, Any]]) -> Counts:
    # Compare, since a status that an owner wrote may be of an unhashable type.
    by_status = {
        status.value: sum(int(group["n"]) for group in groups if group["_id"]["status"] == status)
        for status in Status
    }
    known = [status.value for status in Status]
    states = [(group["_id"]["status"], int(group["n"])) for group in groups]
    live = sum(int(group["live"]) for group in groups if group["_id"]["status"] == Status.PROCESSING)
    created = [group["oldest"] for group in groups if group["_id"]["status"] == Status.PENDING]
    failed = [group for group in groups if group["_id"]["status"] == Status.ERROR]
    return Counts(
        **by_status,
        live_leases=live,
        expired_leases=by_status[Status.PROCESSING.value] - live,
        oldest_pending=min((time for time in created if isinstance(time, datetime)), default=None),
        undelivered=sum(int(group["untold"]) for group in groups),
        pending_webhooks=sum(int(group["owed"]) for group in groups),
        images=sum(int(group["images"]) for group in groups if group["_id"]["status"] == Status.COMPLETED),
        errors={str(group["_id"].get("code")): int(group["n"]) for group in failed},
        other=merged_counts((state, number) for state, number in states if state not in known),
    )


_RESULTS_BATCH_SIZE: Final = 100
"""Documents in one response of the server."""


class MongoResults:
    """The Results part of the database, documented by the Protocol."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._datasets = session.datasets

    def completed(self, selection: Selection, run_id: str | None = None) -> Iterator[CompletedPrompt]:
        """See Results.completed."""
        found = self._finished(Status.COMPLETED, selection, run_id, COMPLETED_FIELDS)
        return (completed_prompt(*_read(document)) for document in found)

    def failures(self, selection: Selection, run_id: str | None = None) -> Iterator[Failure]:
        """See Results.failures."""
        found = self._finished(Status.ERROR, selection, run_id, FAILED_PROMPT_FIELDS)
        return (failed_prompt(*_read(document)) for document in found)

    def _finished(
        self, status: Status, selection: Selection, run_id: str | None, fields: Sequence[str]
    ) -> Iterator[Document]:
        matching: Document = {"status": status.value, **selected(selection)}
        if run_id is not None:
            matching["run_id"] = {"$eq": run_id}
        projection = ["dataset_id", *fields]
        try:
            with self._datasets.find(matching, projection, batch_size=_RESULTS_BATCH_SIZE) as cursor:
                yield from cursor
        except (PyMongoError, BSONError, OverflowError, UnicodeEncodeError) as exc:
            raise DatabaseFailed(error_message(exc, self.session.address, self.session.name)) from exc


def _read(document: Document) -> tuple[Any, str | None, Document]:
    dataset = document.get("dataset_id")
    return id_of(document["_id"]), None if dataset is None else str(id_of(dataset)), document
