"""The outbox in MongoDB: marks on prompts, and notifications in ``callbacks``; implements Outbox.

A final outcome's ``untold`` is True at first, then the id of the notification it is assigned to; it is
removed when that is saved. Its ``webhook_untold`` is the id of the notification for the prompt's own
webhook, until that is saved.

A notification's ``state`` is ``due``, ``told``, ``refused`` or ``replaced``. It is ``replacing``, and holds
its ``parts``, until these are saved as notifications of their own.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from pymongo import ReturnDocument
from pymongo.errors import BulkWriteError

from text2img.databases import Notification, PendingWebhook, is_webhook_id, webhook_id
from text2img.databases.documents import (
    MAX_BYTES,
    NOTIFICATION_FIELDS,
    WEBHOOK_ID,
    WEBHOOK_PENDING,
    count_of,
    undelivered_of,
)
from text2img.databases.mongo.session import DUPLICATE_KEY, Session, reason_of, translate_errors
from text2img.databases.mongo.updates import (
    DUE,
    EXPIRED,
    LEASED,
    NOW,
    count,
    from_now,
    id_of,
    literals,
    value_of,
)
from text2img.errors import WritesRejected
from text2img.prompts import Status

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from text2img.databases import UndeliveredOutcome
    from text2img.databases.mongo.session import Document
    from text2img.prompts import PromptId

_MAX_ROUNDS: Final = 20
_OURS: Final = {"_id": {"$type": "string"}}
"""Notifications with ids of other types are another program's."""
_FIELDS: Final = dict.fromkeys(NOTIFICATION_FIELDS, 1)
_REOPEN: Final = {"$set": {"state": "due"}, "$unset": {"closed_at": "", "not_before": ""}}
_CLOSED: Final = {"state": {"$in": ["told", "refused"]}}
_FINISHED: Final = {
    "status": {"$in": [Status.COMPLETED.value, Status.ERROR.value]},
    WEBHOOK_PENDING: {"$exists": False},
}


class MongoOutbox:
    """The Outbox part of the database, documented by the Protocol."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._datasets, self._runs, self._callbacks = session.datasets, session.runs, session.callbacks

    @translate_errors
    def collect(
        self, run_id: str, notification_id: str, limit: int, max_bytes: int | None = None
    ) -> tuple[list[UndeliveredOutcome], bool]:
        """See Outbox.collect. Outcomes assigned by an earlier call stay assigned."""
        undelivered = {"untold": True, "run_id": run_id}
        missing = limit - self._datasets.count_documents({"untold": notification_id})
        for _ in range(_MAX_ROUNDS if missing > 0 else 0):
            found = self._first(undelivered, missing, max_bytes)
            marking = {"_id": {"$in": found}, **undelivered}
            if (
                not found
                or self._datasets.update_many(marking, {"$set": {"untold": notification_id}}).matched_count
            ):
                break
        marked = self._datasets.find({"untold": notification_id}, _FIELDS).sort("_id")
        collected = [_outcome(document) for document in marked]
        return collected, self._datasets.find_one(undelivered, {"_id": 1}) is not None

    def _first(self, undelivered: Document, limit: int, max_bytes: int | None) -> list[object]:
        """Return the ids of the first undelivered outcomes, of ``max_bytes`` together or just one."""
        if max_bytes is None:
            return [document["_id"] for document in self._datasets.find(undelivered, {"_id": 1}, limit=limit)]
        found: list[object] = []
        with self._datasets.find(undelivered, _FIELDS, limit=limit) as cursor:
            for document in cursor:
                max_bytes -= _outcome(document).size
                if found and max_bytes < 0:
                    break
                found.append(document["_id"])
        return found

    @translate_errors
    def save_notification(self, notification: Notification) -> None:
        """See Outbox.save_notification. Saves first, so that a crash in between duplicates nothing."""
        self._insert([_document(notification)])
        self._mark_delivered(notification.id)

    @translate_errors
    def undelivered_runs(self) -> list[str]:
        """See Outbox.undelivered_runs."""
        marks = self._datasets.aggregate(
            [
                {"$match": {"untold": {"$exists": True}}},
                {"$group": {"_id": {"run_id": "$run_id", "untold": "$untold"}}},
            ]
        )
        groups = [(mark["_id"].get("run_id"), mark["_id"].get("untold")) for mark in marks]
        # Marks of other types are not the job's. BSON's Code is a subclass of str, but not text.
        groups = [(run, mark) for run, mark in groups if type(run) is str and type(mark) in {str, bool}]
        alive = self._alive({run_id for run_id, _ in groups})
        dead = [(run_id, mark) for run_id, mark in groups if run_id not in alive]
        waiting = {run_id for run_id, mark in dead if mark is True or not self._settle(run_id, mark)}
        return sorted(waiting)

    @translate_errors
    def pending_webhooks(self, limit: int) -> list[PendingWebhook]:
        """See Outbox.pending_webhooks. One command, served by a partial index."""
        marked = {WEBHOOK_PENDING: {"$exists": True, "$type": "string"}}
        fields = {**_FIELDS, **dict.fromkeys((WEBHOOK_PENDING, "run_id", "webhook_url"), 1)}
        pending: list[PendingWebhook] = []
        left = MAX_BYTES
        with self._datasets.find(marked, fields, limit=limit) as cursor:
            for document in cursor:
                outcome = _outcome(document)
                left -= outcome.size
                if pending and left < 0:
                    break
                pending.append(
                    PendingWebhook(
                        notification_id=document[WEBHOOK_PENDING],
                        run_id=str(document.get("run_id")),
                        webhook_url=document.get("webhook_url"),
                        outcome=outcome,
                    )
                )
        return pending

    @translate_errors
    def repeat_webhooks(self, ids: Sequence[PromptId]) -> int:
        """See Outbox.repeat_webhooks. A prompt that is finished in between keeps what it has by then."""
        wanted = {"_id": {"$in": [value_of(prompt_id) for prompt_id in ids]}}
        repeated = 0
        for prompt in self._datasets.find({**wanted, **_FINISHED}, {WEBHOOK_ID: 1}):
            kept = prompt.get(WEBHOOK_ID)
            notification_id = kept if is_webhook_id(kept) else webhook_id()
            if self._callbacks.find_one({"_id": notification_id}, {"_id": 1}) is not None:
                closed = {"_id": notification_id, **_CLOSED}
                repeated += self._callbacks.update_one(closed, _REOPEN).modified_count
            else:
                marks = {WEBHOOK_PENDING: notification_id, WEBHOOK_ID: notification_id}
                same = {"_id": {"$eq": prompt["_id"]}, **_FINISHED}
                repeated += self._datasets.update_one(same, {"$set": marks}).modified_count
        return repeated

    @translate_errors
    def repeat_notification(self, notification: Notification) -> None:
        """See Outbox.repeat_notification."""
        self._insert([_document(notification)])
        self._callbacks.update_one({"_id": notification.id, **_CLOSED}, _REOPEN)

    @translate_errors
    def enqueue_webhooks(
        self, pending_webhooks: Sequence[PendingWebhook], notifications: Sequence[Notification]
    ) -> None:
        """See Outbox.enqueue_webhooks. Saves first, so that a crash in between duplicates nothing."""
        self._insert([_document(notification) for notification in notifications])
        if pending_webhooks:
            ids = {WEBHOOK_PENDING: {"$in": [webhook.notification_id for webhook in pending_webhooks]}}
            self._datasets.update_many(ids, {"$unset": {WEBHOOK_PENDING: ""}})

    @translate_errors
    def claim_notification(
        self,
        worker: str,
        lease_seconds: float,
        *,
        webhooks: bool = False,
        exclude_origins: Collection[str] = (),
    ) -> Notification | None:
        """See Outbox.claim_notification. One command, which is atomic.

        It also finds a notification whose replacement was interrupted, and completes that first.
        """
        while True:
            found = self._claim(worker, lease_seconds, _for_receiver(webhooks, exclude_origins))
            if found is None or found.get("state") == "due":
                break
            self._complete_replacement(found["_id"])
        if found is None:
            return None
        body = found.get("body")
        return Notification(
            id=found["_id"],
            run_id=str(found.get("run_id")),
            body=body if isinstance(body, str) else "",
            tries=count_of(found.get("tries")),
            url=found.get("url"),
            origin=found.get("origin"),
        )

    def _claim(self, worker: str, lease_seconds: float, receiver: Document) -> Document | None:
        found: Document | None = self._callbacks.find_one_and_update(
            {"state": {"$in": ["due", "replacing"]}, **_OURS, **receiver, "$and": [DUE, EXPIRED]},
            [
                {
                    "$set": {
                        **literals({"claimed_by": worker}),
                        "tries": {"$add": [count("tries"), 1]},
                        "lease_expires_at": from_now(lease_seconds),
                    }
                }
            ],
            sort=[("created_at", 1), ("_id", 1)],
            return_document=ReturnDocument.AFTER,
        )
        return found

    @translate_errors
    def complete_notification(self, notification: Notification, *, delivered: bool, detail: str) -> None:
        """See Outbox.complete_notification. A closed notification stays as it is."""
        closed = {"state": "told" if delivered else "refused", "detail": detail}
        self._callbacks.update_one(
            {"_id": notification.id, "state": "due"},
            [
                {"$set": {**literals(closed), "closed_at": NOW}},
                {"$unset": ["claimed_by", "lease_expires_at", "not_before"]},
            ],
        )

    @translate_errors
    def replace_notification(
        self, notification: Notification, parts: Sequence[Notification], detail: str
    ) -> None:
        """See Outbox.replace_notification. The first command decides; ``claim_notification`` resumes.

        Closed notifications are kept, so that a part that another worker has delivered or replaced since is
        not inserted again.
        """
        replacing = {"state": "replacing", "detail": detail, "parts": [_document(part) for part in parts]}
        self._callbacks.update_one(
            {"_id": notification.id, "state": "due"}, [{"$set": literals(replacing)}, {"$unset": "body"}]
        )
        self._complete_replacement(notification.id)

    @translate_errors
    def reopen_notifications(self) -> int:
        """See Outbox.reopen_notifications. One command."""
        return self._callbacks.update_many({"state": "refused", **_OURS}, _REOPEN).modified_count

    @translate_errors
    def reschedule_notification(self, notification: Notification, wait: float, detail: str) -> None:
        """See Outbox.reschedule_notification. Does nothing if another worker has claimed it since."""
        self._callbacks.update_one(
            {"_id": notification.id, "state": "due", "tries": notification.tries},
            [
                {"$set": {**literals({"detail": detail}), "not_before": from_now(wait)}},
                {"$unset": ["claimed_by", "lease_expires_at"]},
            ],
        )

    @translate_errors
    def notifications(self, *, webhooks: bool = False) -> tuple[int, int]:
        """See Outbox.notifications. Two commands, each served by the index."""
        due, refused = (
            self._callbacks.count_documents({"state": state, **_OURS, **_for_receiver(webhooks)})
            for state in ({"$in": ["due", "replacing"]}, "refused")
        )
        return due, refused

    @translate_errors
    def undelivered(self, *, webhooks: bool = False) -> int:
        """See Outbox.undelivered. One command."""
        return self._datasets.count_documents({WEBHOOK_PENDING if webhooks else "untold": {"$exists": True}})

    def _alive(self, run_ids: set[object]) -> set[object]:
        running = {"_id": {"$in": list(run_ids)}, "status": "running", **LEASED}
        return {run["_id"] for run in self._runs.find(running, {"_id": 1})}

    def _settle(self, run_id: object, notification_id: object) -> bool:
        """Mark the outcomes as delivered if the notification is saved, else undelivered; return if it is."""
        if self._callbacks.find_one({"_id": notification_id}, {"_id": 1}) is not None:
            self._mark_delivered(notification_id)
            return True
        self._datasets.update_many({"untold": notification_id, "run_id": run_id}, {"$set": {"untold": True}})
        return False

    def _complete_replacement(self, notification_id: object) -> None:
        """Save the parts of a notification that is being replaced, unless they are saved; then close it."""
        replacing = {"_id": notification_id, "state": "replacing"}
        found = self._callbacks.find_one(replacing)
        if found is None:
            return
        # At the place of the whole: what comes last in a run's notifications still comes last.
        parts = found["parts"] if isinstance(found.get("parts"), list) else []
        ours = [part for part in parts if isinstance(part, dict) and isinstance(part.get("_id"), str)]
        self._insert([{**part, "created_at": found.get("created_at")} for part in ours])
        self._callbacks.update_one(
            replacing,
            [
                {"$set": {"state": "replaced", "closed_at": NOW}},
                {"$unset": ["parts", "claimed_by", "lease_expires_at", "not_before"]},
            ],
        )

    def _insert(self, documents: Sequence[Document]) -> None:
        """Insert the notifications whose ids are new; those that are saved never change."""
        if not documents:
            return
        try:
            self._callbacks.insert_many(documents, ordered=False)
        except BulkWriteError as exc:
            if exc.details["writeConcernErrors"]:
                raise
            errors = {documents[error["index"]]["_id"]: error for error in exc.details["writeErrors"]}
            saved = {found["_id"] for found in self._callbacks.find({"_id": {"$in": [*errors]}}, {"_id": 1})}
            for notification_id, error in errors.items():
                if error["code"] != DUPLICATE_KEY or notification_id not in saved:
                    name = self._callbacks.name
                    raise WritesRejected(f"{name}: {reason_of(error, name)}") from exc

    def _mark_delivered(self, notification_id: object) -> None:
        self._datasets.update_many({"untold": notification_id}, {"$unset": {"untold": ""}})


def _outcome(document: Document) -> UndeliveredOutcome:
    return undelivered_of(id_of(document["_id"]), document)


def _document(notification: Notification) -> Document:
    webhook = {} if notification.url is None else {"url": notification.url, "origin": notification.origin}
    return {
        "_id": notification.id,
        "run_id": notification.run_id,
        "body": notification.body,
        "tries": notification.tries,
        "state": "due",
        "created_at": datetime.now(UTC),
        **webhook,
    }


def _for_receiver(webhooks: bool, exclude_origins: Collection[str] = ()) -> Document:  # noqa: FBT001
    """Return the filter for notifications to the callback's receiver, or to prompts' own webhooks."""
    return {"origin": {"$type": "string", "$nin": [*exclude_origins]} if webhooks else None}
