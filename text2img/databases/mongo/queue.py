"""The queue in MongoDB: prompts claimed, held, written down and given back. The contract is Queue's.

Every write is fenced by worker and claim number and costs one command for any number of prompts.
"""

from __future__ import annotations

import secrets
import uuid
from typing import TYPE_CHECKING, Any, Final

from pymongo import UpdateMany, UpdateOne
from pymongo.errors import BulkWriteError

from text2img.databases.documents import CLAIM_FIELDS, PROMPT_FIELDS, count_of, deaths_at_claim, prompt_of
from text2img.databases.mongo.session import Session, translate_errors
from text2img.databases.mongo.updates import (
    CLAIMABLE,
    DUE,
    EXPIRED,
    NOW,
    PENDING,
    POSTPONED,
    PROCESSING,
    all_held,
    changed,
    count,
    held,
    id_of,
    ids,
    literals,
    replaced,
    selected,
    value_of,
    within,
)
from text2img.databases.outcome_updates import (
    IDENTITY_FIELDS,
    absent_from,
    change_of,
    result_of,
    written_already,
)
from text2img.errors import DatabaseFailed
from text2img.prompts import Claim, Completed, Status

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pymongo.collection import Collection

    from text2img.databases import Selection
    from text2img.prompts import Outcome, Prompt, PromptId


_DUPLICATE_KEY: Final = 11000
_FENCING_FIELDS: Final = ("claim_number", *IDENTITY_FIELDS)
_MARK_STARTED: Final = {"$set": {"started_claim": "$claim_number"}}
_UNMARK_STARTED: Final = {"$unset": "started_claim"}
_RELEASE: Final = dict.fromkeys(CLAIM_FIELDS, "")


class MongoQueue(Session):
    """The Queue part of the database; the docstrings of the Protocol hold."""

    @translate_errors
    def claim(self, worker: str, limit: int, lease_seconds: float, selection: Selection) -> list[Prompt]:
        """See Queue.claim. Two commands; one more for every time that others were quicker."""
        return claim_prompts(self.datasets, worker, limit, lease_seconds, selection)

    @translate_errors
    def peek(self, limit: int, selection: Selection) -> list[Prompt]:
        """See Queue.peek. One command."""
        return peek_prompts(self.datasets, limit, selection)

    @translate_errors
    def start(self, claims: Sequence[Claim], left: Sequence[Claim] = ()) -> None:
        """See Queue.start. One command."""
        marks = ((claims, _MARK_STARTED), (left, _UNMARK_STARTED))
        if changes := [UpdateMany(all_held(which), [mark]) for which, mark in marks if which]:
            self.datasets.bulk_write(changes)

    @translate_errors
    def extend(self, claims: Sequence[Claim], lease_seconds: float) -> list[Claim]:
        """See Queue.extend. One command, and one more where a claim is lost."""
        if not claims:
            return []
        update = [{"$set": {"lease_expires_at": within(lease_seconds)}}]
        if self.datasets.update_many(all_held(claims), update).matched_count == len(claims):
            return []
        kept = {id_of(found["_id"]) for found in self.datasets.find(all_held(claims), {"_id": 1})}
        return [claim for claim in claims if claim.id not in kept]

    @translate_errors
    def holds(self, claim: Claim) -> bool:
        """See Queue.holds."""
        return self.datasets.find_one(held(claim), {"_id": 1}) is not None

    @translate_errors
    def record(self, outcomes: Sequence[Outcome], run_id: str, *, tell: bool) -> list[Outcome]:
        """See Queue.record. Two commands, and one more where a claim is lost or was written down before."""
        completed = [outcome for outcome in outcomes if isinstance(outcome, Completed)]
        outdone = self._record_results(completed, run_id)
        writable = [outcome for outcome in outcomes if outcome.claim not in outdone]
        if not writable:
            return []
        updates = [UpdateOne(held(one.claim), changed(change_of(one, run_id, tell=tell))) for one in writable]
        if self.datasets.bulk_write(updates, ordered=False).matched_count == len(writable):
            return writable
        found = self.datasets.find(ids([one.claim for one in writable]), dict.fromkeys(_FENCING_FIELDS, 1))
        documents = {id_of(document["_id"]): document for document in found}
        written = [one for one in writable if written_already(one, run_id, documents.get(one.claim.id, {}))]
        self._delete_orphaned_results([one.claim for one in writable if one not in written], documents)
        return written

    @translate_errors
    def release(self, claims: Sequence[Claim]) -> None:
        """See Queue.release. One command."""
        if claims:
            pending = {"status": Status.PENDING.value}
            self.datasets.update_many(all_held(claims), {"$set": pending, "$unset": _RELEASE})

    @translate_errors
    def release_dead(self, worker: str) -> int:
        """See Queue.expire. One command."""
        gone = {**PROCESSING, "claimed_by": {"$eq": worker}}
        return self.datasets.update_many(gone, [{"$set": {"lease_expires_at": NOW}}]).matched_count

    @translate_errors
    def waits(self, selection: Selection) -> bool:
        """See Queue.waits. One command; two where nothing is pending."""
        pending, expired = {**PENDING, **DUE}, {**PROCESSING, **EXPIRED}
        return any(
            self.datasets.find_one({**selected(selection), **which}, {"_id": 1}) is not None
            for which in (pending, expired)
        )

    @translate_errors
    def pending(self, selection: Selection) -> int:
        """See Queue.pending."""
        return self.datasets.count_documents({**selected(selection), **CLAIMABLE})

    @translate_errors
    def postponed(self, selection: Selection) -> int:
        """See Queue.postponed."""
        return self.datasets.count_documents({**selected(selection), **PENDING, **POSTPONED})

    def _record_results(self, completed: Sequence[Completed], run_id: str) -> set[Claim]:
        """Upsert the results; returns the claims that a result with a greater number outdoes."""
        if not completed:
            return set()
        upserts = [
            UpdateOne(
                # A result without a claim number is older than the job's claims: it may be replaced.
                {
                    "dataset_id": {"$eq": value_of(done.claim.id)},
                    "claim_number": {"$not": {"$gt": done.claim.number}},
                },
                replaced(result_of(done, run_id), absent_from(done)),
                upsert=True,
            )
            for done in completed
        ]
        try:
            self.records.bulk_write(upserts, ordered=False)
        except BulkWriteError as exc:
            errors = exc.details["writeErrors"]
            if exc.details["writeConcernErrors"] or any(error["code"] != _DUPLICATE_KEY for error in errors):
                raise
            outdone = {completed[error["index"]].claim for error in errors}
            self._release_superseded(outdone)
            return outdone
        return set()

    def _delete_orphaned_results(
        self, lost: Sequence[Claim], documents: Mapping[PromptId, Mapping[str, Any]]
    ) -> None:
        """Remove the results of claims that turned out to be lost: there may never be another one. What a
        later claim has put in their place has a greater number, and stays.
        """
        for claim in lost:
            prompt = documents.get(claim.id, {})
            if (prompt.get("status"), prompt.get("claim_number")) != (Status.COMPLETED.value, claim.number):
                result = {"dataset_id": {"$eq": value_of(claim.id)}, "claim_number": claim.number}
                self.records.delete_one(result)

    def _release_superseded(self, outdone: set[Claim]) -> None:
        """Give back what is held although a result has a greater number: its prompt was put back without
        its claim number, by its owner. The next claim starts above the result's, or it would never end.
        """
        for claim in outdone:
            result = self.records.find_one({"dataset_id": {"$eq": value_of(claim.id)}}, {"claim_number": 1})
            number = (result or {}).get("claim_number", claim.number)
            back = {"status": Status.PENDING.value, "claim_number": number}
            self.datasets.update_one(held(claim), {"$set": back, "$unset": _RELEASE})


if TYPE_CHECKING:
    Document = dict[str, Any]

_ROUNDS = 100
_WIDEST = 512
_BY_PRIORITY: Document = {"priority": -1, "_id": 1}
_BY_ID: Document = {"_id": 1}
_TIERS: tuple[tuple[Document, Document], ...] = (
    ({**PENDING, "priority": {"$gt": 0}, **DUE}, _BY_PRIORITY),
    ({**PENDING, "priority": {"$in": [None, 0]}, **DUE}, _BY_ID),
    ({**PENDING, "priority": {"$lt": 0}, **DUE}, _BY_PRIORITY),
    ({**PENDING, **DUE}, _BY_ID),  # a priority that is no number must not keep a prompt from being drawn
    ({**PROCESSING, **EXPIRED}, _BY_PRIORITY),
)
"""Claimable prompts, the most urgent first, and how each tier is sorted. Every tier is a range of one
index: an absent priority, which counts as 0, sorts below every number there."""


def claim_prompts(
    datasets: Collection[Document], worker: str, limit: int, lease_seconds: float, selection: Selection
) -> list[Prompt]:
    """At most ``limit`` prompts that are this worker's from now on; see Queue.claim.

    Each round in which others took all candidates was progress of theirs, so that the rounds come to an
    end; they look at more and more prompts, and at some place among them, to get out of one another's way.
    """
    if limit < 1:
        return []
    for attempt in range(_ROUNDS):
        width = limit if attempt == 0 else min(max(limit * 2, 16) * 2**attempt, limit + _WIDEST)
        found = _candidates(datasets, width, selection)
        if not found:
            return []
        first = secrets.randbelow(len(found) - limit + 1) if len(found) > limit else 0
        taken = _take(datasets, found[first : first + limit], worker, lease_seconds)
        if taken:
            return taken
    raise DatabaseFailed(
        f"{_ROUNDS} times in a row every claimable prompt was taken by others; start fewer workers"
    )


def peek_prompts(datasets: Collection[Document], limit: int, selection: Selection) -> list[Prompt]:
    """The first ``limit`` candidates as prompts, left as they are; see Queue.peek."""
    if limit < 1:
        return []
    return [_prompt(document, "nobody") for document in _candidates(datasets, limit, selection)]


def candidates_pipeline(collection: str, limit: int, selection: Selection) -> list[Document]:
    """The aggregation that finds the candidates, every tier by itself and in order."""
    wanted = selected(selection)
    stages: list[list[Document]] = [
        [
            {"$match": {**wanted, **tier}},
            {"$sort": order},
            {"$limit": limit},
            {"$project": dict.fromkeys(PROMPT_FIELDS, 1)},
        ]
        for tier, order in _TIERS
    ]
    rest: list[Document] = [{"$unionWith": {"coll": collection, "pipeline": stage}} for stage in stages[1:]]
    # The surplus leaves room for the fourth tier, which shows prompts of the first three again.
    return [*stages[0], *rest, {"$limit": limit * 2}]


def _candidates(datasets: Collection[Document], limit: int, selection: Selection) -> list[Document]:
    found: dict[object, Document] = {}
    for document in datasets.aggregate(candidates_pipeline(datasets.name, limit, selection)):
        found.setdefault(id_of(document["_id"]), document)
    return list(found.values())[:limit]


def _take(
    datasets: Collection[Document], candidates: Sequence[Document], worker: str, lease_seconds: float
) -> list[Prompt]:
    token = uuid.uuid4().hex
    unclaimed_since = [
        {"_id": {"$eq": document["_id"]}, "claim_number": {"$eq": document.get("claim_number")}}
        for document in candidates
    ]
    # By _id first, so that its index serves; then each by the number it had.
    names = {"_id": {"$in": [document["_id"] for document in candidates]}}
    result = datasets.update_many(
        {"$and": [names, {"$or": unclaimed_since}, CLAIMABLE]}, _claimed(worker, token, lease_seconds)
    )
    ours = candidates if result.matched_count == len(candidates) else []
    if 0 < result.matched_count < len(candidates):
        kept = {id_of(found["_id"]) for found in datasets.find({**names, "claim_token": token}, {"_id": 1})}
        ours = [document for document in candidates if id_of(document["_id"]) in kept]
    return [_prompt(document, worker) for document in ours]


def _claimed(worker: str, token: str, lease_seconds: float) -> list[Document]:
    died = {
        "$and": [
            {"$eq": ["$status", Status.PROCESSING.value]},
            {"$ne": [{"$type": "$started_claim"}, "missing"]},
            {"$eq": ["$started_claim", "$claim_number"]},
        ]
    }
    marks = {"status": Status.PROCESSING.value, "claimed_by": worker, "claim_token": token}
    counters = {
        "claim_number": {"$add": [count("claim_number"), 1]},
        "deaths": {"$cond": [died, {"$add": [count("deaths"), 1]}, "$deaths"]},
    }
    claimed = {**literals(marks), **counters, "lease_expires_at": within(lease_seconds)}
    return [{"$set": claimed}, {"$unset": ["started_claim", "not_before"]}]


def _prompt(document: Document, worker: str) -> Prompt:
    number = count_of(document.get("claim_number")) + 1
    return prompt_of(Claim(id_of(document["_id"]), worker, number), document, deaths_at_claim(document))
