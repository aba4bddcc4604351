"""Telling, kept in MongoDB: untold marks on prompts, and notices in ``callbacks``. The contract is Telling's.

A final outcome's ``untold`` is True, then the id of the notice that is being made of it, then gone. Its
``webhook_untold`` is the id that the notice for the prompt's own webhook has, until that is kept.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from pymongo import ReturnDocument
from pymongo.errors import BulkWriteError, DuplicateKeyError

from text2img.databases import Notification, PendingWebhook
from text2img.databases.documents import TOLD_FIELDS, WEBHOOK_PENDING, count_of, undelivered_of
from text2img.databases.mongo.session import Session, translate_errors
from text2img.databases.mongo.updates import DUE, EXPIRED, LEASED, NOW, count, id_of, literals, within

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from text2img.databases import UndeliveredOutcome
    from text2img.databases.mongo.session import Document

_ROUNDS: Final = 20
_DUPLICATE_KEY: Final = 11000


class MongoOutbox(Session):
    """The Telling part of the database; the docstrings of the Protocol hold."""

    @translate_errors
    def collect(self, run_id: str, notice_id: str, limit: int) -> tuple[list[UndeliveredOutcome], bool]:
        """See Telling.gather. What the notice had gathered before belongs to it still."""
        undelivered = {"untold": True, "run_id": run_id}
        room = limit - self.datasets.count_documents({"untold": notice_id})
        for _ in range(_ROUNDS if room > 0 else 0):
            found = [each["_id"] for each in self.datasets.find(undelivered, {"_id": 1}, limit=room)]
            marking = {"_id": {"$in": found}, **undelivered}
            if not found or self.datasets.update_many(marking, {"$set": {"untold": notice_id}}).matched_count:
                break
        marked = self.datasets.find({"untold": notice_id}, dict.fromkeys(TOLD_FIELDS, 1)).sort("_id")
        gathered = [undelivered_of(id_of(document["_id"]), document) for document in marked]
        return gathered, self.datasets.find_one(undelivered, {"_id": 1}) is not None

    @translate_errors
    def save_notification(self, notification: Notification) -> None:
        """See Telling.save_notice. The notice is kept first: a crash in between tells nothing twice."""
        with suppress(DuplicateKeyError):  # it is kept already, and never changes
            self.callbacks.insert_one(_document(notification))
        self._count_as_told(notification.id)

    @translate_errors
    def undelivered_runs(self) -> list[str]:
        """See Telling.untold_runs."""
        marks = self.datasets.aggregate(
            [
                {"$match": {"untold": {"$exists": True}}},
                {"$group": {"_id": {"run_id": "$run_id", "untold": "$untold"}}},
            ]
        )
        groups = [(mark["_id"].get("run_id"), mark["_id"].get("untold")) for mark in marks]
        # Marks of any other kind are not the job's; BSON's JavaScript is a kind of str, and no text.
        groups = [(run, mark) for run, mark in groups if type(run) is str and type(mark) in {str, bool}]
        alive = self._alive({run_id for run_id, _ in groups})
        dead = [(run_id, undelivered) for run_id, undelivered in groups if run_id not in alive]
        waiting = [
            run_id
            for run_id, undelivered in dead
            if undelivered is True or not self._settled(run_id, undelivered)
        ]
        return sorted(set(waiting))

    @translate_errors
    def pending_webhooks(self, limit: int) -> list[PendingWebhook]:
        """See Telling.owed. One command, served by an index of what is owed alone."""
        marked = {WEBHOOK_PENDING: {"$exists": True, "$type": "string"}}
        fields = dict.fromkeys((WEBHOOK_PENDING, "run_id", "webhook_url", *TOLD_FIELDS), 1)
        return [
            PendingWebhook(
                notice_id=document[WEBHOOK_PENDING],
                run_id=str(document.get("run_id")),
                webhook_url=document.get("webhook_url"),
                outcome=undelivered_of(id_of(document["_id"]), document),
            )
            for document in self.datasets.find(marked, fields, limit=limit)
        ]

    @translate_errors
    def enqueue_webhooks(
        self, pending_webhooks: Sequence[PendingWebhook], notifications: Sequence[Notification]
    ) -> None:
        """See Telling.settle_owed. The notices are kept first: a crash in between tells nothing twice."""
        if notifications:
            try:
                self.callbacks.insert_many(map(_document, notifications), ordered=False)
            except BulkWriteError as exc:
                errors = exc.details["writeErrors"]
                if exc.details["writeConcernErrors"] or any(e["code"] != _DUPLICATE_KEY for e in errors):
                    raise
        if pending_webhooks:
            ids = {WEBHOOK_PENDING: {"$in": [each.notice_id for each in pending_webhooks]}}
            self.datasets.update_many(ids, {"$unset": {WEBHOOK_PENDING: ""}})

    @translate_errors
    def claim_notification(
        self, worker: str, lease_seconds: float, *, webhooks: bool = False, but: Collection[str] = ()
    ) -> Notification | None:
        """See Telling.claim_notice. One command, which the server does atomically."""
        found = self.callbacks.find_one_and_update(
            {"state": "due", **_whose(webhooks, but), "$and": [DUE, EXPIRED]},
            [
                {
                    "$set": {
                        **literals({"claimed_by": worker}),
                        "tries": {"$add": [count("tries"), 1]},
                        "lease_expires_at": within(lease_seconds),
                    }
                }
            ],
            sort=[("created_at", 1), ("_id", 1)],
            return_document=ReturnDocument.AFTER,
        )
        if found is None:
            return None
        return Notification(
            id=str(found["_id"]),
            run_id=str(found["run_id"]),
            body=str(found["body"]),
            tries=count_of(found.get("tries")),
            url=found.get("url"),
            origin=found.get("origin"),
        )

    @translate_errors
    def complete_notification(self, notification: Notification, *, told: bool, detail: str) -> None:
        """See Telling.close_notice. A notice that is closed stays as it is."""
        closed = {"state": "told" if told else "refused", "detail": detail, "tries": notification.tries}
        self.callbacks.update_one(
            {"_id": notification.id, "state": "due"},
            [
                {"$set": {**literals(closed), "closed_at": NOW}},
                {"$unset": ["claimed_by", "lease_expires_at", "not_before"]},
            ],
        )

    @translate_errors
    def reschedule_notification(self, notification: Notification, wait: float, detail: str) -> None:
        """See Telling.postpone_notice. Passed over where another worker has tried it since."""
        self.callbacks.update_one(
            {"_id": notification.id, "state": "due", "tries": notification.tries},
            [
                {"$set": {**literals({"detail": detail}), "not_before": within(wait)}},
                {"$unset": ["claimed_by", "lease_expires_at"]},
            ],
        )

    @translate_errors
    def notifications(self, *, webhooks: bool = False) -> tuple[int, int]:
        """See Telling.notices. Two commands, each served by the index."""
        due, refused = (
            self.callbacks.count_documents({"state": state, **_whose(webhooks)})
            for state in ("due", "refused")
        )
        return due, refused

    @translate_errors
    def undelivered(self, *, webhooks: bool = False) -> int:
        """See Telling.untold. One command."""
        return self.datasets.count_documents({WEBHOOK_PENDING if webhooks else "untold": {"$exists": True}})

    def _alive(self, run_ids: set[object]) -> set[object]:
        running = {"_id": {"$in": list(run_ids)}, "status": "running", **LEASED}
        return {run["_id"] for run in self.runs.find(running, {"_id": 1})}

    def _settled(self, run_id: object, notice_id: object) -> bool:
        """Whether the notice is kept, so that its outcomes count as told; else they are untold again."""
        if self.callbacks.find_one({"_id": notice_id}, {"_id": 1}) is not None:
            self._count_as_told(notice_id)
            return True
        self.datasets.update_many({"untold": notice_id, "run_id": run_id}, {"$set": {"untold": True}})
        return False

    def _count_as_told(self, notice_id: object) -> None:
        self.datasets.update_many({"untold": notice_id}, {"$unset": {"untold": ""}})


def _document(notification: Notification) -> Document:
    own = {} if notification.url is None else {"url": notification.url, "origin": notification.origin}
    return {
        "_id": notification.id,
        "run_id": notification.run_id,
        "body": notification.body,
        "tries": notification.tries,
        "state": "due",
        "created_at": datetime.now(UTC),
        **own,
    }


def _whose(webhooks: bool, but: Collection[str] = ()) -> Document:  # noqa: FBT001 - as the caller has it
    """The filter for notices of one kind of receiver."""
    return {"origin": {"$type": "string", "$nin": [*but]} if webhooks else None}
