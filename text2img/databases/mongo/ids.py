"""BSON values as prompt ids and back, and the values that an id given as text may stand for."""

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

from text2img.databases.documents import readings
from text2img.errors import ConfigurationError
from text2img.prompts import PromptId

if TYPE_CHECKING:
    from collections.abc import Callable

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
    return [*readings(text), *([ObjectId(text)] if _HEX.fullmatch(text) else [])]


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
