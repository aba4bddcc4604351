"""The queue in MongoDB: claim, renew, record and release prompts; implements Queue.

Every write is fenced by worker and claim number, and is one command for any number of prompts.
"""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from pymongo import UpdateMany, UpdateOne
from pymongo.errors import BulkWriteError, PyMongoError

from text2img.databases.documents import CLAIM_FIELDS, PROMPT_FIELDS, count_of, deaths_at_claim, prompt_of
from text2img.databases.mongo.session import (
    DUPLICATE_KEY,
    Session,
    exists,
    index_of,
    reason_of,
    rejection,
    translate_errors,
    write_each,
)
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
    probe,
    result_of,
    unwritable,
    unwritable_message,
    written_already,
)
from text2img.errors import DatabaseFailed, WritesRejected
from text2img.prompts import Claim, Completed, Failed, Status

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pymongo.collection import Collection

    from text2img.databases import PutAside, Selection
    from text2img.prompts import Outcome, Prompt, PromptId


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
    def claim(
        self,
        worker: str,
        limit: int,
        lease_seconds: float,
        selection: Selection,
        put_aside: PutAside | None = None,
    ) -> list[Prompt]:
        """See Queue.claim. Two commands, and more for each round that is lost to other workers."""
        lease = _Lease(worker, lease_seconds, put_aside or _refuse)
        return claim_prompts(self._datasets, lease, limit, selection)

    @translate_errors
    def peek(self, limit: int, selection: Selection) -> list[Prompt]:
        """See Queue.peek. One command."""
        return peek_prompts(self._datasets, limit, selection)

    @translate_errors
    def start(self, claims: Sequence[Claim], left: Sequence[Claim] = ()) -> None:
        """See Queue.start. One command."""
        marks = ((claims, _MARK_STARTED), (left, _UNMARK_STARTED))
        if changes := [UpdateMany(all_held(group), [mark]) for group, mark in marks if group]:
            try:
                self._datasets.bulk_write(changes)
            except BulkWriteError as exc:
                for error in exc.details["writeErrors"]:
                    reason_of(error, self._datasets.name)  # raises unless the fault is a document's
                for group, mark in marks:
                    write_each(self._datasets, [UpdateOne(held(claim), [mark]) for claim in group])

    @translate_errors
    def extend(self, claims: Sequence[Claim], lease_seconds: float) -> list[Claim]:
        """See Queue.extend. One command, and one more if a claim is lost."""
        if not claims:
            return []
        update = [{"$set": {"lease_expires_at": from_now(lease_seconds)}}]
        try:
            if self._datasets.update_many(all_held(claims), update).matched_count == len(claims):
                return []
        except PyMongoError as exc:
            if rejection(exc) is None:
                raise
            _, errors = write_each(self._datasets, [UpdateOne(held(claim), update) for claim in claims])
            rejected = [claims[index] for index in errors]
            others = [claim for claim in claims if claim not in rejected]
            return [*rejected, *self.extend(others, lease_seconds)]
        kept = {id_of(found["_id"]) for found in self._datasets.find(all_held(claims), {"_id": 1})}
        return [claim for claim in claims if claim.id not in kept]

    @translate_errors
    def holds(self, claim: Claim) -> bool:
        """See Queue.holds."""
        return self._datasets.find_one(held(claim), {"_id": 1}) is not None

    @translate_errors
    def record(
        self,
        outcomes: Sequence[Outcome],
        run_id: str,
        *,
        notify: bool,
        put_aside: PutAside | None = None,
    ) -> list[Outcome]:
        """See Queue.record. Two commands, and one more if a claim is lost or was recorded before."""
        completed = [outcome for outcome in outcomes if isinstance(outcome, Completed)]
        superseded, rejected = self._record_results(completed, run_id)
        writable = [
            unwritable(outcome, rejected[outcome.claim]) if outcome.claim in rejected else outcome
            for outcome in outcomes
            if outcome.claim not in superseded
        ]
        if not writable:
            return []
        matched, errors = write_each(self._datasets, self._updates(writable, run_id, notify=notify))
        if errors:
            reasons = {index: reason_of(error, self._datasets.name) for index, error in errors.items()}
            failed = [unwritable(writable[index], reason) for index, reason in reasons.items()]
            written = self._record_failed(failed, run_id, notify=notify, put_aside=put_aside or _refuse)
            others = [outcome for index, outcome in enumerate(writable) if index not in errors]
            return [*written, *self._written(others, run_id)]
        return writable if matched == len(writable) else self._written(writable, run_id)

    def _updates(self, outcomes: Sequence[Outcome], run_id: str, *, notify: bool) -> list[UpdateOne]:
        return [
            UpdateOne(held(outcome.claim), changed(change_of(outcome, run_id, notify=notify)))
            for outcome in outcomes
        ]

    def _record_failed(
        self, failed: Sequence[Failed], run_id: str, *, notify: bool, put_aside: PutAside
    ) -> list[Outcome]:
        """Record prompts that cannot be written as they are as failed; put aside those that reject that too.

        Their results are deleted.
        """
        _, errors = write_each(self._datasets, self._updates(failed, run_id, notify=notify))
        for index, error in errors.items():
            reason_of(error, self._datasets.name)
            prompt = failed[index].prompt
            write_each(self._datasets, [UpdateOne(held(prompt.claim), _RELEASED)])
            put_aside(prompt, failed[index].message)
        for outcome in failed:
            self._records.delete_one(_result_of_claim(outcome.claim))
        return self._written([each for index, each in enumerate(failed) if index not in errors], run_id)

    def _written(self, writable: Sequence[Outcome], run_id: str) -> list[Outcome]:
        """Return those of the outcomes that the documents show; delete the results of the others."""
        if not writable:
            return []
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
        self._release(claims, _RELEASED)

    @translate_errors
    def release_stalled(self, claims: Sequence[Claim]) -> None:
        """See Queue.release_stalled. One command."""
        self._release(claims, _STALLED)

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

    @translate_errors
    def check_results(self) -> None:
        """See Queue.check_results. Two results: an index that takes one may reject the second."""
        if not exists(self._records):
            return  # a probe would create it, and nothing in it can reject results
        run_id = f"text2img-check-{uuid.uuid4().hex}"
        probes = [probe(f"{run_id}-{number}") for number in range(2)]
        try:
            superseded, rejected = self._record_results(probes, run_id)
            if superseded or rejected:
                reason = next(iter(rejected.values()), "they are superseded")
                raise WritesRejected(f"{self._records.name} does not take results: {reason}")
        finally:
            self._records.delete_many({"dataset_id": {"$in": [value_of(done.claim.id) for done in probes]}})

    @translate_errors
    def check_claim(self, selection: Selection) -> None:
        """See Queue.check_claim. The copy is claimed for an hour as it is inserted."""
        found = _candidates(self._datasets, 1, selection)
        original = found and self._datasets.find_one({"_id": {"$eq": found[0]["_id"]}})
        if not original:
            return
        name = f"text2img-check-{uuid.uuid4().hex}"
        try:
            # Inserted by the update itself: only the claimed document has to satisfy the owner's schema.
            copy = literals({field: value for field, value in original.items() if field != "_id"})
            update = [{"$set": copy}, *_claim_update(name, name, 3600.0)]
            _, errors = write_each(self._datasets, [UpdateOne({"_id": name}, update, upsert=True)])
            for error in errors.values():
                if error["code"] != DUPLICATE_KEY:  # an index that forbids a copy does not forbid a claim
                    reason = unwritable_message(reason_of(error, self._datasets.name))
                    raise WritesRejected(f"{id_of(original['_id'])}: {reason}")
        finally:
            self._datasets.delete_one({"_id": name})

    def _record_results(
        self, completed: Sequence[Completed], run_id: str
    ) -> tuple[set[Claim], dict[Claim, str]]:
        """Upsert the results; return the claims superseded by a greater number, and why others failed."""
        if not completed:
            return set(), {}
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
        _, errors = write_each(self._records, upserts)
        superseded, rejected = set(), {}
        for index, error in errors.items():
            claim = completed[index].claim
            if error["code"] == DUPLICATE_KEY and self._is_result_index(error):
                superseded.add(claim)
            else:
                rejected[claim] = f"its result was rejected: {reason_of(error, self._records.name)}"
        self._release_superseded(superseded)
        return superseded, rejected

    def _is_result_index(self, error: Mapping[str, Any]) -> bool:
        """Return True if the violated index is the one that allows a prompt one result, under any name."""
        keys = error.get("keyPattern")
        if keys is None:
            name = index_of(error)
            found = self._records.index_information().get(name)
            keys = dict(found["key"]) if found else {}
        return list(keys) == ["dataset_id"]

    def _delete_orphaned_results(
        self, lost: Sequence[Claim], documents: Mapping[PromptId, Mapping[str, Any]]
    ) -> None:
        """Delete the results of lost claims, since the prompt may never get another result.

        A result of a later claim has a greater number and stays.
        """
        for claim in lost:
            prompt = documents.get(claim.id, {})
            if (prompt.get("status"), prompt.get("claim_number")) != (Status.COMPLETED.value, claim.number):
                self._records.delete_one(_result_of_claim(claim))

    def _release(self, claims: Sequence[Claim], update: Document | list[Document]) -> None:
        """Requeue the prompts by the update; one by one if the owner's schema rejects it for one of them."""
        if not claims:
            return
        try:
            self._datasets.update_many(all_held(claims), update)
        except PyMongoError as exc:
            if rejection(exc) is None:
                raise
            write_each(self._datasets, [UpdateOne(held(claim), update) for claim in claims])

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
_RELEASED: Document = {"$set": {"status": Status.PENDING.value}, "$unset": _RELEASE}
_STALLED: list[Document] = [
    {"$set": {"status": Status.PENDING.value, "deaths": {"$add": [count("deaths"), 1]}}},
    {"$unset": list(CLAIM_FIELDS)},
]
_TIERS: tuple[tuple[Document, Document], ...] = (
    ({**PENDING, "priority": {"$gt": 0}, **DUE}, _BY_PRIORITY),
    ({**PENDING, "priority": {"$in": [None, 0]}, **DUE}, _BY_ID),
    ({**PENDING, "priority": {"$lt": 0}, **DUE}, _BY_PRIORITY),
    ({**PENDING, **DUE}, _BY_ID),  # a priority that is not a number must not block a prompt
    ({**PROCESSING, **EXPIRED}, _BY_PRIORITY),
)
"""The tiers of claimable prompts, the most urgent first, with their sort orders. Every tier is a range of one
index: a missing priority, which counts as 0, sorts below every number there."""


@dataclass(frozen=True, slots=True)
class _Lease:
    """What a claim gives: the prompts to ``worker`` for ``seconds``; see Queue.claim."""

    worker: str
    seconds: float
    put_aside: PutAside


def _refuse(prompt: Prompt, reason: str) -> None:
    raise DatabaseFailed(f"{prompt.id}: {reason}")


def _result_of_claim(claim: Claim) -> Document:
    return {"dataset_id": {"$eq": value_of(claim.id)}, "claim_number": claim.number}


def claim_prompts(
    datasets: Collection[Document], lease: _Lease, limit: int, selection: Selection
) -> list[Prompt]:
    """Claim at most ``limit`` prompts for the worker; see Queue.claim.

    Each lost round means that other workers made progress, so the loop terminates. Every round widens the
    candidate window and starts at a random offset to reduce contention. Documents that were put aside are
    not candidates again.
    """
    if limit < 1:
        return []
    aside: set[PromptId] = set()

    def put_aside(prompt: Prompt, reason: str) -> None:
        lease.put_aside(prompt, reason)
        aside.add(prompt.id)

    taking = replace(lease, put_aside=put_aside)
    for attempt in range(_MAX_ROUNDS):
        width = limit if attempt == 0 else min(max(limit * 2, 16) * 2**attempt, limit + _MAX_SURPLUS)
        found = _candidates(datasets, width, replace(selection, exclude=selection.exclude | aside))
        if not found:
            return []
        first = secrets.randbelow(len(found) - limit + 1) if len(found) > limit else 0
        taken = _take(datasets, found[first : first + limit], taking)
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


def _take(datasets: Collection[Document], candidates: Sequence[Document], lease: _Lease) -> list[Prompt]:
    token = uuid.uuid4().hex
    update = _claim_update(lease.worker, token, lease.seconds)
    unclaimed_since = [
        {"_id": {"$eq": document["_id"]}, "claim_number": {"$eq": document.get("claim_number")}}
        for document in candidates
    ]
    # By _id first, to use its index; then each by the claim number it had.
    by_id = {"_id": {"$in": [document["_id"] for document in candidates]}}
    try:
        matched = datasets.update_many({"$and": [by_id, {"$or": unclaimed_since}, CLAIMABLE]}, update)
        if matched.matched_count == len(candidates):
            return [_prompt(document, lease.worker) for document in candidates]
        if matched.matched_count == 0:
            return []
    except PyMongoError as exc:
        if rejection(exc) is None:
            raise
        # Some may be claimed already; of the others each is tried by itself.
        claims = [UpdateOne({"$and": [since, CLAIMABLE]}, update) for since in unclaimed_since]
        _, errors = write_each(datasets, claims)
        for index, error in errors.items():
            prompt = _prompt(candidates[index], lease.worker)
            lease.put_aside(prompt, unwritable_message(reason_of(error, datasets.name)))
    ours = {id_of(found["_id"]) for found in datasets.find({**by_id, "claim_token": token}, {"_id": 1})}
    return [_prompt(document, lease.worker) for document in candidates if id_of(document["_id"]) in ours]


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
