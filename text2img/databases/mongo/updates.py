"""The pieces that MongoDB's filters and updates are made of here.

Every moment is the server's: ``$$NOW`` inside aggregation expressions, which updates written as pipelines
and filters with ``$expr`` understand. So workers whose clocks differ agree on when a lease has run out.
Values are wrapped in ``$literal``, since a pipeline would take a text such as "$5 note" for a field's name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from text2img.databases.documents import COUNTABLE
from text2img.databases.mongo.ids import value_of, values_for
from text2img.prompts import Status

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from text2img.databases import Selection
    from text2img.databases.outcome_updates import Change
    from text2img.prompts import Claim, PromptId

    Expression = dict[str, Any]

NOW: Final = "$$NOW"


def is_ahead(name: str) -> Expression:
    """Whether the field holds a moment that is still to come.

    Compared as milliseconds, which numbers and texts could be read as, too: but whatever is no moment is
    not ahead, and holds nothing up.
    """
    moment = {"$eq": [{"$type": f"${name}"}, "date"]}
    milliseconds = {"$convert": {"input": f"${name}", "to": "long", "onError": None, "onNull": None}}
    return {"$and": [moment, {"$gt": [milliseconds, {"$toLong": NOW}]}]}


DUE: Final = {"$expr": {"$not": [is_ahead("not_before")]}}
POSTPONED: Final = {"$expr": is_ahead("not_before")}
LEASED: Final = {"$expr": is_ahead("lease_expires_at")}
EXPIRED: Final = {"$expr": {"$not": [is_ahead("lease_expires_at")]}}
PENDING: Final = {"status": {"$in": [Status.PENDING.value, None]}}
PROCESSING: Final = {"status": Status.PROCESSING.value}
CLAIMABLE: Final = {"$or": [{**PENDING, **DUE}, {**PROCESSING, **EXPIRED}]}
"""A prompt in processing without a lease, as another program may have left it, counts as expired."""


def within(seconds: float) -> Expression:
    """The moment ``seconds`` from now."""
    return {"$add": [NOW, round(seconds * 1000)]}


def count(name: str) -> Expression:
    """A counter's value, as ``count_of`` reads it: whatever can be no count counts as none."""
    value = f"${name}"
    number = {"$in": [{"$type": value}, ["int", "long", "double"]]}
    countable = {"$and": [number, {"$gte": [value, 0]}, {"$lt": [value, COUNTABLE]}]}
    return {"$cond": [countable, {"$toLong": value}, 0]}


def literals(fields: Mapping[str, object]) -> Expression:
    """The fields with their values, taken as they stand."""
    return {name: {"$literal": value} for name, value in fields.items()}


def changed(change: Change) -> list[Expression]:
    """The update that an outcome makes."""
    moments: Expression = {change.moment: NOW} if change.moment else {}
    if change.wait is not None:
        moments["not_before"] = within(change.wait)
    return [{"$set": {**literals(change.fields), **moments}}, {"$unset": list(change.gone)}]


def replaced(result: Mapping[str, object], absent: Sequence[str]) -> list[Expression]:
    """The update that makes a result of whatever stands in its place; ``absent`` fields are gone then."""
    made: Expression = {"$set": {**literals(result), "created_at": NOW}}
    return [made, {"$unset": list(absent)}] if absent else [made]


def selected(selection: Selection) -> Expression:
    """The filter of a selection."""
    if selection.dataset_id is None:
        return {}
    values = values_for(selection.dataset_id)
    return {"dataset_id": values[0] if len(values) == 1 else {"$in": values}}


def ids(claims: Iterable[Claim]) -> Expression:
    """The filter for the claims' prompts, whoever holds them."""
    return {"_id": {"$in": [value_of(claim.id) for claim in claims]}}


def other_than(prompt_id: PromptId, content: Mapping[str, object]) -> Expression:
    """The filter for the prompt of that id, where some field is not as in ``content`` (None: absent or null)
    and nobody holds it.
    """
    fields = content.items()
    differs = [{"$ne": [{"$ifNull": [f"${name}", None]}, {"$literal": value}]} for name, value in fields]
    leased = {"$and": [{"$eq": ["$status", Status.PROCESSING.value]}, is_ahead("lease_expires_at")]}
    return {"_id": {"$eq": value_of(prompt_id)}, "$expr": {"$and": [{"$or": differs}, {"$not": [leased]}]}}


def held(claim: Claim) -> Expression:
    """The filter that lets only the claim's holder through."""
    return {
        "_id": {"$eq": value_of(claim.id)},
        **PROCESSING,
        "claimed_by": claim.worker,
        "claim_number": claim.number,
    }


def all_held(claims: Sequence[Claim]) -> Expression:
    """The filter that lets each claim's holder through; by ``_id`` first, so that its index serves."""
    return {**ids(claims), "$or": [held(claim) for claim in claims]}
