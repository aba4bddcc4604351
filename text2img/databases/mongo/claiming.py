"""Claiming in MongoDB: two commands for any number of prompts, three where workers meet.

Candidates are looked up, then taken by one update that lets through only those nobody has claimed since:
the filter names each one's claim number. If all went through, what was read is what was taken. If not, the
claim's token tells which are ours.
"""

from __future__ import annotations

import secrets
import uuid
from typing import TYPE_CHECKING, Any

from text2img.databases.documents import PROMPT_FIELDS, count_of, deaths_at_claim, prompt_of
from text2img.databases.mongo.ids import id_of
from text2img.databases.mongo.updates import (
    CLAIMABLE,
    DUE,
    EXPIRED,
    PENDING,
    PROCESSING,
    count,
    literals,
    selected,
    within,
)
from text2img.errors import DatabaseFailed
from text2img.prompts import Claim, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pymongo.collection import Collection

    from text2img.databases import Selection
    from text2img.prompts import Prompt

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
