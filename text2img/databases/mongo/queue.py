"""The queue in MongoDB: claim, renew, record and release prompts; implements Queue.

Every write is fenced by worker and claim number, and is one command for any number of prompts.
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
    from_now,
    held,
    id_of,
    ids,
    literals,
    replaced,
    selected,
    value_of,
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


class MongoQueue:
    """The Queue part of the database, documented by the Protocol."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._datasets, self._records = session.datasets, session.records

    @translate_errors
    def claim(self, worker: str, limit: int, lease_seconds: float, selection: Selection) -> list[Prompt]:
        """See Queue.claim. Two commands, and more for each round that is lost to other workers."""
        return claim_prompts(self._datasets, worker, limit, lease_seconds, selection)

    @translate_errors
    def peek(self, limit: int, selection: Selection) -> list[Prompt]:
        """See Queue.peek. One command."""
        return peek_prompts(self._datasets, limit, selection)

    @translate_errors
    def start(self, claims: Sequence[Claim], left: Sequence[Claim] = ()) -> None:
        """See Queue.start. One command."""
        marks = ((claims, _MARK_STARTED), (left, _UNMARK_STARTED))
        if changes := [UpdateMany(all_held(group), [mark]) for group, mark in marks if group]:
            self._datasets.bulk_write(changes)

    @translate_errors
    def extend(self, claims: Sequence[Claim], lease_seconds: float) -> list[Claim]:
        """See Queue.extend. One command, and one more if a claim is lost."""
        if not claims:
            return []
        update = [{"$set": {"lease_expires_at": from_now(lease_seconds)}}]
        if self._datasets.update_many(all_held(claims), update).matched_count == len(claims):
            return []
        kept = {id_of(found["_id"]) for found in self._datasets.find(all_held(claims), {"_id": 1})}
        return [claim for claim in claims if claim.id not in kept]

    @translate_errors
    def holds(self, claim: Claim) -> bool:
        """See Queue.holds."""
        return self._datasets.find_one(held(claim), {"_id": 1}) is not None

    @translate_errors
    def record(self, outcomes: Sequence[Outcome], run_id: str, *, notify: bool) -> list[Outcome]:
        """See Queue.record. Two commands, and one more if a claim is lost or was recorded before."""
        completed = [outcome for outcome in outcomes if isinstance(outcome, Completed)]
        superseded = self._record_results(completed, run_id)
        writable = [outcome for outcome in outcomes if outcome.claim not in superseded]
        if not writable:
            return []
        updates = [
            UpdateOne(held(outcome.claim), changed(change_of(outcome, run_id, notify=notify)))
            for outcome in writable
        ]
        if self._datasets.bulk_write(updates, ordered=False).matched_count == len(writable):
            return writable
        claims = [outcome.claim for outcome in writable]
        found = self._datasets.find(ids(claims), dict.fromkeys(_FENCING_FIELDS, 1))
        documents = {id_of(document["_id"]): document for document in found}
        written = [
            outcome
            for outcome in writable
            if written_already(outcome, run_id, documents.get(outcome.claim.id, {}))
        ]
        lost = [outcome.claim for outcome in writable if outcome not in written]
        self._delete_orphaned_results(lost, documents)
        return written

    @translate_errors
    def release(self, claims: Sequence[Claim]) -> None:
        """See Queue.release. One command."""
        if claims:
            pending = {"status": Status.PENDING.value}
            self._datasets.update_many(all_held(claims), {"$set": pending, "$unset": _RELEASE})

    @translate_errors
    def release_dead(self, worker: str) -> int:
        """See Queue.release_dead. One command."""
        claimed = {**PROCESSING, "claimed_by": {"$eq": worker}}
        return self._datasets.update_many(claimed, [{"$set": {"lease_expires_at": NOW}}]).matched_count

    @translate_errors
    def has_claimable(self, selection: Selection) -> bool:
        """See Queue.has_claimable. One command; two if nothing is pending."""
        pending, expired = {**PENDING, **DUE}, {**PROCESSING, **EXPIRED}
        return any(
            self._datasets.find_one({**selected(selection), **condition}, {"_id": 1}) is not None
            for condition in (pending, expired)
        )

    @translate_errors
    def pending(self, selection: Selection) -> int:
        """See Queue.pending."""
        return self._datasets.count_documents({**selected(selection), **CLAIMABLE})

    @translate_errors
    def postponed(self, selection: Selection) -> int:
        """See Queue.postponed."""
        return self._datasets.count_documents({**selected(selection), **PENDING, **POSTPONED})

    def _record_results(self, completed: Sequence[Completed], run_id: str) -> set[Claim]:
        """Upsert the results; return the claims superseded by a result with a greater claim number."""
        if not completed:
            return set()
        upserts = [
            UpdateOne(
                # A result without a claim number does not come from a claim: it may be replaced.
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
            self._records.bulk_write(upserts, ordered=False)
        except BulkWriteError as exc:
            errors = exc.details["writeErrors"]
            if exc.details["writeConcernErrors"] or any(error["code"] != _DUPLICATE_KEY for error in errors):
                raise
            superseded = {completed[error["index"]].claim for error in errors}
            self._release_superseded(superseded)
            return superseded
        return set()

    def _delete_orphaned_results(
        self, lost: Sequence[Claim], documents: Mapping[PromptId, Mapping[str, Any]]
    ) -> None:
        """Delete the results of lost claims, since the prompt may never get another result.

        A result of a later claim has a greater number and stays.
        """
        for claim in lost:
            prompt = documents.get(claim.id, {})
            if (prompt.get("status"), prompt.get("claim_number")) != (Status.COMPLETED.value, claim.number):
                result = {"dataset_id": {"$eq": value_of(claim.id)}, "claim_number": claim.number}
                self._records.delete_one(result)

    def _release_superseded(self, claims: set[Claim]) -> None:
        """Requeue prompts that are held although their result has a greater claim number.

        Their owner has requeued them without their claim number. The next claim's number must be above the
        result's; otherwise the prompt could never be recorded.
        """
        for claim in claims:
            result = self._records.find_one({"dataset_id": {"$eq": value_of(claim.id)}}, {"claim_number": 1})
            number = (result or {}).get("claim_number", claim.number)
            pending = {"status": Status.PENDING.value, "claim_number": number}
            self._datasets.update_one(held(claim), {"$set": pending, "$unset": _RELEASE})


if TYPE_CHECKING:
    Document = dict[str, Any]

_MAX_ROUNDS = 100
_MAX_SURPLUS = 512
_BY_PRIORITY: Document = {"priority": -1, "_id": 1}
_BY_ID: Document = {"_id": 1}
_TIERS: tuple[tuple[Document, Document], ...] = (
    ({**PENDING, "priority": {"$gt": 0}, **DUE}, _BY_PRIORITY),
    ({**PENDING, "priority": {"$in": [None, 0]}, **DUE}, _BY_ID),
    ({**PENDING, "priority": {"$lt": 0}, **DUE}, _BY_PRIORITY),
    ({**PENDING, **DUE}, _BY_ID),  # a priority that is not a number must not block a prompt
    ({**PROCESSING, **EXPIRED}, _BY_PRIORITY),
)
"""The tiers of claimable prompts, the most urgent first, with their sort orders. Every tier is a range of one
index: a missing priority, which counts as 0, sorts below every number there."""


def claim_prompts(
    datasets: Collection[Document], worker: str, limit: int, lease_seconds: float, selection: Selection
) -> list[Prompt]:
    """Claim at most ``limit`` prompts for the worker; see Queue.claim.

    Each lost round means that other workers made progress, so the loop terminates. Every round widens the
    candidate window and starts at a random offset to reduce contention.
    """
    if limit < 1:
        return []
    for attempt in range(_MAX_ROUNDS):
        width = limit if attempt == 0 else min(max(limit * 2, 16) * 2**attempt, limit + _MAX_SURPLUS)
        found = _candidates(datasets, width, selection)
        if not found:
            return []
        first = secrets.randbelow(len(found) - limit + 1) if len(found) > limit else 0
        taken = _take(datasets, found[first : first + limit], worker, lease_seconds)
        if taken:
            return taken
    raise DatabaseFailed(
        f"other workers claimed every candidate {_MAX_ROUNDS} times in a row; start fewer workers"
    )


def peek_prompts(datasets: Collection[Document], limit: int, selection: Selection) -> list[Prompt]:
    """Return the first ``limit`` candidates as prompts, without claiming them; see Queue.peek."""
    if limit < 1:
        return []
    return [_prompt(document, "unclaimed") for document in _candidates(datasets, limit, selection)]


def candidates_pipeline(collection: str, limit: int, selection: Selection) -> list[Document]:
    """Return the aggregation that finds the candidates, tier by tier, in order."""
    selecting = selected(selection)
    stages: list[list[Document]] = [
        [
            {"$match": {**selecting, **tier}},
            {"$sort": order},
            {"$limit": limit},
            {"$project": dict.fromkeys(PROMPT_FIELDS, 1)},
        ]
        for tier, order in _TIERS
    ]
    rest: list[Document] = [{"$unionWith": {"coll": collection, "pipeline": stage}} for stage in stages[1:]]
    # The surplus makes room for the fourth tier, which repeats prompts of the first three.
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
    # By _id first, to use its index; then each by the claim number it had.
    by_id = {"_id": {"$in": [document["_id"] for document in candidates]}}
    result = datasets.update_many(
        {"$and": [by_id, {"$or": unclaimed_since}, CLAIMABLE]}, _claim_update(worker, token, lease_seconds)
    )
    claimed = candidates if result.matched_count == len(candidates) else []
    if 0 < result.matched_count < len(candidates):
        ours = {id_of(found["_id"]) for found in datasets.find({**by_id, "claim_token": token}, {"_id": 1})}
        claimed = [document for document in candidates if id_of(document["_id"]) in ours]
    return [_prompt(document, worker) for document in claimed]


def _claim_update(worker: str, token: str, lease_seconds: float) -> list[Document]:
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
    claimed = {**literals(marks), **counters, "lease_expires_at": from_now(lease_seconds)}
    return [{"$set": claimed}, {"$unset": ["started_claim", "not_before"]}]


def _prompt(document: Document, worker: str) -> Prompt:
    number = count_of(document.get("claim_number")) + 1
    return prompt_of(Claim(id_of(document["_id"]), worker, number), document, deaths_at_claim(document))
