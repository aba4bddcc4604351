"""The pieces that MongoDB's filters and updates are made of here.

Every moment is the server's: ``$$NOW`` inside aggregation expressions, which updates written as pipelines
and filters with ``$expr`` understand. So workers whose clocks differ agree on when a lease has run out.
Values are wrapped in ``$literal``, since a pipeline would take a text such as "$5 note" for a field's name.
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


_CANONICAL: Final = json_util.JSONOptions(
    json_mode=json_util.JSONMode.CANONICAL,
    tz_aware=True,
    uuid_representation=UuidRepresentation.STANDARD,
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
)
# Read back as plain binaries: a UUID of the old subtype 3 would otherwise return as one of subtype 4.
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
    """The prompt id of any BSON value; integers of 32 and 64 bits are the same id, as they are to MongoDB."""
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
    kind = next((name for known, name in _KINDS if isinstance(value, known)), "bson")
    return PromptId(kind, json_util.dumps(value, json_options=_CANONICAL))


def value_of(prompt_id: PromptId) -> Any:
    """The BSON value of a prompt id; raises ConfigurationError for what MongoDB cannot keep."""
    text = prompt_id.text
    read = _READERS.get(prompt_id.kind)
    return read(text) if read else json_util.loads(text, json_options=_AS_WRITTEN)


def values_for(text: str) -> list[object]:
    """The values that an id given as text matches: the text, the ObjectId or the number it reads as."""
    return [*parse_id_candidates(text), *([ObjectId(text)] if _HEX.fullmatch(text) else [])]


def _integer(text: str) -> int:
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise ConfigurationError(f"MongoDB keeps no whole number as long as the id {text}; write it as text")
    return number


_READERS: Final[dict[str, Callable[[str], Any]]] = {
    "str": str,
    "int": _integer,
    "double": float,
    "objectid": ObjectId,
    "uuid": uuid.UUID,
    "bool": lambda text: text == "true",
    "null": lambda _: None,
}
