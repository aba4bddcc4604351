"""Telling, kept in MongoDB: untold marks on prompts, and notices in ``callbacks``. The contract is Telling's.

A final outcome's ``untold`` is True, then the id of the notice that is being made of it, then gone.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from text2img.databases import Notice
from text2img.databases.documents import count_of, untold_of
from text2img.databases.mongo.connection import reported
from text2img.databases.mongo.ids import id_of
from text2img.databases.mongo.session import Session
from text2img.databases.mongo.updates import DUE, EXPIRED, LEASED, NOW, count, literals, within

if TYPE_CHECKING:
    from text2img.databases import Untold
    from text2img.databases.mongo.connection import Document

_TOLD_OF: Final = (
    "text",
    "prompt_tags",
    "status",
    "image_url",
    "image_urls",
    "score",
    "used.seed",
    "error_code",
    "error",
)
_ROUNDS: Final = 20


class MongoTelling(Session):
    """The Telling part of the database; the docstrings of the Protocol hold."""

    @reported
    def gather(self, run_id: str, notice_id: str, limit: int) -> tuple[list[Untold], bool]:
        """See Telling.gather. What the notice had gathered before belongs to it still."""
        untold = {"untold": True, "run_id": run_id}
        room = limit - self.datasets.count_documents({"untold": notice_id})
        for _ in range(_ROUNDS if room > 0 else 0):
            found = [each["_id"] for each in self.datasets.find(untold, {"_id": 1}, limit=room)]
            marking = {"_id": {"$in": found}, **untold}
            if not found or self.datasets.update_many(marking, {"$set": {"untold": notice_id}}).matched_count:
                break
        marked = self.datasets.find({"untold": notice_id}, dict.fromkeys(_TOLD_OF, 1)).sort("_id")
        gathered = [untold_of(id_of(document["_id"]), document) for document in marked]
        return gathered, self.datasets.find_one(untold, {"_id": 1}) is not None

    @reported
    def save_notice(self, notice: Notice) -> None:
        """See Telling.save_notice. The notice is kept first: a crash in between tells nothing twice."""
        document: Document = {
            "_id": notice.id,
            "run_id": notice.run_id,
            "body": notice.body,
            "tries": notice.tries,
            "state": "due",
            "created_at": datetime.now(UTC),
        }
        with suppress(DuplicateKeyError):  # it is kept already, and never changes
            self.callbacks.insert_one(document)
        self._count_as_told(notice.id)

    @reported
    def untold_runs(self) -> list[str]:
        """See Telling.untold_runs."""
        marks = self.datasets.aggregate(
            [
                {"$match": {"untold": {"$exists": True}}},
                {"$group": {"_id": {"run_id": "$run_id", "untold": "$untold"}}},
            ]
        )
        groups = [(mark["_id"].get("run_id"), mark["_id"].get("untold")) for mark in marks]
        # Marks of any other kind are not the job's.
        groups = [
            (run, mark) for run, mark in groups if isinstance(run, str) and isinstance(mark, str | bool)
        ]
        alive = self._alive({run_id for run_id, _ in groups})
        dead = [(run_id, untold) for run_id, untold in groups if run_id not in alive]
        waiting = [run_id for run_id, untold in dead if untold is True or not self._settled(run_id, untold)]
        return sorted(set(waiting))

    @reported
    def claim_notice(self, worker: str, lease_seconds: float) -> Notice | None:
        """See Telling.claim_notice. One command, which the server does atomically."""
        found = self.callbacks.find_one_and_update(
            {"state": "due", "$and": [DUE, EXPIRED]},
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
        tries = count_of(found.get("tries"))
        return Notice(id=str(found["_id"]), run_id=str(found["run_id"]), body=str(found["body"]), tries=tries)

    @reported
    def close_notice(self, notice: Notice, *, told: bool, detail: str) -> None:
        """See Telling.close_notice. A notice that is closed stays as it is."""
        closed = {"state": "told" if told else "refused", "detail": detail, "tries": notice.tries}
        self.callbacks.update_one(
            {"_id": notice.id, "state": "due"},
            [
                {"$set": {**literals(closed), "closed_at": NOW}},
                {"$unset": ["claimed_by", "lease_expires_at", "not_before"]},
            ],
        )

    @reported
    def postpone_notice(self, notice: Notice, wait: float, detail: str) -> None:
        """See Telling.postpone_notice. Passed over where another worker has tried it since."""
        self.callbacks.update_one(
            {"_id": notice.id, "state": "due", "tries": notice.tries},
            [
                {"$set": {**literals({"detail": detail}), "not_before": within(wait)}},
                {"$unset": ["claimed_by", "lease_expires_at"]},
            ],
        )

    @reported
    def notices(self) -> tuple[int, int]:
        """See Telling.notices. Two commands, each served by the index."""
        due, refused = (self.callbacks.count_documents({"state": state}) for state in ("due", "refused"))
        return due, refused

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
