"""Building blocks of MongoDB filters and updates, and the conversion of prompt ids to and from BSON.

Every timestamp is the server's: ``$$NOW`` in aggregation expressions, which pipeline updates and ``$expr``
filters accept. So workers whose clocks differ agree on when a lease has expired. Values are wrapped in
``$literal``, since a pipeline would take a text such as "$5 note" for a field's name.
"""

from __future__ import annotations

import datetime as dt
import re
import uuid
from typing import TYPE_CHECKING, Any, Final

from bson import json_util
from bson.binary import Binary, UuidRepresentation
from bson.code import Code
from bson.codec_options import DatetimeConversion
from bson.datetime_ms import DatetimeMS
from bson.decimal128 import Decimal128
from bson.max_key import MaxKey
from bson.min_key import MinKey
from bson.objectid import ObjectId
from bson.regex import Regex
from bson.timestamp import Timestamp

from text2img.databases.documents import COUNTABLE, parse_id_candidates
from text2img.errors import ConfigurationError
from text2img.prompts import PromptId, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from text2img.databases import Selection
    from text2img.databases.outcome_updates import Change
    from text2img.prompts import Claim


if TYPE_CHECKING:
    Expression = dict[str, Any]

NOW: Final = "$$NOW"


def in_future(name: str) -> Expression:
    """Return the expression that is true if the field holds a date in the future.

    Dates are compared as milliseconds. Numbers and texts would convert too, so the type is checked: a value
    that is not a date is not in the future and delays nothing.
    """
    is_date = {"$eq": [{"$type": f"${name}"}, "date"]}
    milliseconds = {"$convert": {"input": f"${name}", "to": "long", "onError": None, "onNull": None}}
    return {"$and": [is_date, {"$gt": [milliseconds, {"$toLong": NOW}]}]}


DUE: Final = {"$expr": {"$not": [in_future("not_before")]}}
POSTPONED: Final = {"$expr": in_future("not_before")}
LEASED: Final = {"$expr": in_future("lease_expires_at")}
EXPIRED: Final = {"$expr": {"$not": [in_future("lease_expires_at")]}}
PENDING: Final = {"status": {"$in": [Status.PENDING.value, None]}}
PROCESSING: Final = {"status": Status.PROCESSING.value}
CLAIMABLE: Final = {"$or": [{**PENDING, **DUE}, {**PROCESSING, **EXPIRED}]}
"""A prompt in processing without a lease, as another program may have left it, counts as expired."""


def from_now(seconds: float) -> Expression:
    """Return the expression for the time ``seconds`` from now."""
    return {"$add": [NOW, round(seconds * 1000)]}


def count(name: str) -> Expression:
    """Return the expression for a counter's value, as ``count_of`` reads it: 0 if it is no valid count."""
    value = f"${name}"
    number = {"$in": [{"$type": value}, ["int", "long", "double"]]}
    countable = {"$and": [number, {"$gte": [value, 0]}, {"$lt": [value, COUNTABLE]}]}
    return {"$cond": [countable, {"$toLong": value}, 0]}


def literals(fields: Mapping[str, object]) -> Expression:
    """Return the fields with their values as literals."""
    return {name: {"$literal": value} for name, value in fields.items()}


def changed(change: Change) -> list[Expression]:
    """Return an outcome's update of its prompt."""
    times: Expression = {change.timestamp: NOW} if change.timestamp else {}
    if change.wait is not None:
        times["not_before"] = from_now(change.wait)
    return [{"$set": {**literals(change.fields), **times}}, {"$unset": list(change.removed)}]


def replaced(result: Mapping[str, object], absent: Sequence[str]) -> list[Expression]:
    """Return the update that replaces a result, if there is one, and removes its ``absent`` fields."""
    written: Expression = {"$set": {**literals(result), "created_at": NOW}}
    return [written, {"$unset": list(absent)}] if absent else [written]


def selected(selection: Selection) -> Expression:
    """Return the filter of a selection."""
    filters: Expression = {}
    if selection.exclude:
        filters["_id"] = {"$nin": [value_of(prompt_id) for prompt_id in selection.exclude]}
    if selection.dataset_id is not None:
        values = values_for(selection.dataset_id)
        filters["dataset_id"] = values[0] if len(values) == 1 else {"$in": values}
    return filters


def ids(claims: Iterable[Claim]) -> Expression:
    """Return the filter for the claims' prompts, whether or not the claims are lost."""
    return {"_id": {"$in": [value_of(claim.id) for claim in claims]}}


def differs(prompt_id: PromptId, content: Mapping[str, object]) -> Expression:
    """Return the filter for the prompt if no worker holds it and a field differs from ``content``.

    In ``content``, None means that the field is missing or null.
    """
    fields = content.items()
    unequal = [{"$ne": [{"$ifNull": [f"${name}", None]}, {"$literal": value}]} for name, value in fields]
    leased = {"$and": [{"$eq": ["$status", Status.PROCESSING.value]}, in_future("lease_expires_at")]}
    return {"_id": {"$eq": value_of(prompt_id)}, "$expr": {"$and": [{"$or": unequal}, {"$not": [leased]}]}}


def held(claim: Claim) -> Expression:
    """Return the filter that matches only while the claim is held."""
    return {
        "_id": {"$eq": value_of(claim.id)},
        **PROCESSING,
        "claimed_by": claim.worker,
        "claim_number": claim.number,
    }


def all_held(claims: Sequence[Claim]) -> Expression:
    """Return the filter for all prompts whose claim is held; by ``_id`` first, to use its index."""
    return {**ids(claims), "$or": [held(claim) for claim in claims]}


_CANONICAL: Final = json_util.JSONOptions(
    json_mode=json_util.JSONMode.CANONICAL,
    tz_aware=True,
    uuid_representation=UuidRepresentation.STANDARD,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
)
# Decode binaries as they are: a UUID of the old subtype 3 would otherwise become one of subtype 4.
_AS_WRITTEN: Final = _CANONICAL.with_options(uuid_representation=UuidRepresentation.UNSPECIFIED)
_KINDS: Final[tuple[tuple[type, str], ...]] = (
    (dt.datetime, "date"),
    (DatetimeMS, "date"),
    (Decimal128, "decimal"),
    (Timestamp, "timestamp"),
    (Code, "javascript"),
    (Binary, "binary"),
    (bytes, "binary"),
    (Regex, "regex"),
    (MinKey, "minkey"),
    (MaxKey, "maxkey"),
    (dict, "object"),
)
_HEX: Final = re.compile(r"[0-9a-fA-F]{24}")


def id_of(value: object) -> PromptId:
    """Return the prompt id of any BSON value; as in MongoDB, 32-bit and 64-bit integers are the same id."""
    if value is None:
        return PromptId("null", "null")
    if isinstance(value, bool):
        return PromptId("bool", "true" if value else "false")
    if isinstance(value, str) and not isinstance(value, Code):
        return PromptId("str", value)
    if isinstance(value, ObjectId | uuid.UUID):
        return PromptId("objectid" if isinstance(value, ObjectId) else "uuid", str(value))
    if isinstance(value, int | float):
        return PromptId("int", str(int(value))) if isinstance(value, int) else PromptId("double", repr(value))
    kind = next((name for bson_type, name in _KINDS if isinstance(value, bson_type)), "bson")
    return PromptId(kind, json_util.dumps(value, json_options=_CANONICAL))


def value_of(prompt_id: PromptId) -> Any:
    """Return the BSON value of a prompt id; raise ConfigurationError if MongoDB cannot store it."""
    text = prompt_id.text
    parse = _PARSERS.get(prompt_id.kind)
    return parse(text) if parse else json_util.loads(text, json_options=_AS_WRITTEN)


def values_for(text: str) -> list[object]:
    """Return the values that an id given as text matches: the text, and the ObjectId or number it denotes."""
    return [*parse_id_candidates(text), *([ObjectId(text)] if _HEX.fullmatch(text) else [])]


def _integer(text: str) -> int:
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise ConfigurationError(f"the id {text} is too large for a number in MongoDB; write it as text")
    return number


_PARSERS: Final[dict[str, Callable[[str], Any]]] = {
    "str": str,
    "int": _integer,
    "double": float,
    "objectid": ObjectId,
    "uuid": uuid.UUID,
    "bool": lambda text: text == "true",
    "null": lambda _: None,
}
