"""An entry of a file → a new prompt, or everything that is wrong with it. Knows no file and no database."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any, Final, TypeVar

from text2img.databases import NewPrompt
from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts import PromptId, RequestedParameters
from text2img.prompts.parameters import PARAMETER_NAMES, resolve_parameters
from text2img.prompts.validation import check_number, check_prompt_text, check_text, nearest
from text2img.prompts.webhook_urls import check_form

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


if TYPE_CHECKING:
    _Value = TypeVar("_Value")

FIELDS: Final = (
    *("id", "_id", "text", "prompt_tags", "webhook_url", "dataset_id", "style_id", "priority", "status"),
    *PARAMETER_NAMES,
)
_DEFAULTS: Final = RequestedParameters(num_inference_steps=50, guidance_scale=7.5, width=512, height=512)
MAX_PRIORITY: Final = 1e9
"""Priorities lie between its two signs."""


def new_prompt(entry: object) -> tuple[NewPrompt | None, list[str]]:
    """The prompt of an entry and nothing else, or None and a sentence for each field that is wrong."""
    if isinstance(entry, str):
        entry = {"text": entry}
    if not isinstance(entry, dict):
        return None, [f"must be a mapping with text, not {type(entry).__name__}"]
    asked = _Asked()
    for field in entry:
        if field not in FIELDS:
            asked.complaints.append(f"unknown field {str(field)[:60]!r}{nearest(str(field), FIELDS)}")
    text = _text(asked, entry)
    webhook = asked.of(_webhook, entry)
    labels = {name: asked.of(_label, entry, name) for name in ("dataset_id", "style_id")}
    priority = asked.of(_priority, entry)
    asked.of(_status, entry)
    requested = _wishes(asked, entry)
    # Last: what is not known to be plain may hold itself, or keys that no content can be made of.
    prompt_id = asked.of(_id, entry, made=not asked.complaints)
    if text is None or prompt_id is None or asked.complaints:
        return None, asked.complaints
    prompt = NewPrompt(
        id=prompt_id, text=text, requested=requested, priority=priority, webhook_url=webhook, **labels
    )
    return prompt, []


class _Asked:
    """Asks checks, and keeps what they complain of."""

    def __init__(self) -> None:
        self.complaints: list[str] = []

    def of(self, check: Callable[..., _Value], *arguments: Any, **named: Any) -> _Value | None:
        """What the check returns, or None and one more complaint."""
        try:
            return check(*arguments, **named)
        except PromptFailed as exc:
            self.complaints.append(str(exc))
            return None


def _text(asked: _Asked, entry: Mapping[str, Any]) -> str | None:
    """The text that counts; tags that do not, since there is a text, are checked all the same."""
    text, tags = entry.get("text"), entry.get("prompt_tags")
    read = asked.of(check_prompt_text, text, tags)
    if text is not None and tags is not None:
        asked.of(check_prompt_text, None, tags)
    return read


def _wishes(asked: _Asked, entry: Mapping[str, Any]) -> RequestedParameters:
    """The entry's parameters. Settled together, since what passes so passes alone; where that fails, one by
    one, so that all that is wrong is said at once: what none of them is to blame for is wrong with two.
    """
    requested = RequestedParameters.of(entry)
    try:
        resolve_parameters((requested, _DEFAULTS), seed=0)
    except PromptFailed as exc:
        before = len(asked.complaints)
        for name in PARAMETER_NAMES:
            asked.of(resolve_parameters, (RequestedParameters.of({name: entry.get(name)}), _DEFAULTS), seed=0)
        if len(asked.complaints) == before:
            asked.complaints.append(str(exc))
    return requested


def _webhook(entry: Mapping[str, Any]) -> str | None:
    value = entry.get("webhook_url")
    return None if value is None else check_form(value)


def _priority(entry: Mapping[str, Any]) -> float | None:
    value = entry.get("priority")
    return None if value is None else check_number("priority", value, -MAX_PRIORITY, MAX_PRIORITY)


def _label(entry: Mapping[str, Any], name: str) -> str | int | None:
    """What a prompt is put under, not read for itself: text, or a whole number that databases take."""
    value = whole(entry.get(name))
    if isinstance(value, str):
        return check_text(name, value)
    if isinstance(value, bool) or not (value is None or (isinstance(value, int) and _is_int64(value))):
        raise _wrong(f"{name} must be text or a whole number of 64 bits")
    return value


def _status(entry: Mapping[str, Any]) -> None:
    if entry.get("status") not in (None, "pending"):
        raise _wrong(f"status is {str(entry['status'])[:40]!r}; a new prompt is pending")


def _id(entry: Mapping[Any, Any], *, made: bool) -> PromptId | None:
    """The entry's id; one made from the content where it has none, the same for the same content."""
    given = [entry[name] for name in ("id", "_id") if entry.get(name) is not None]
    if len(given) > 1:
        raise _wrong("id and _id are the same; give one of them")
    value = whole(given[0]) if given else None
    if value is None and not made:
        return None
    if value is None:
        content = json.dumps(entry, sort_keys=True, ensure_ascii=True, default=str)
        return PromptId("str", f"p-{hashlib.sha256(content.encode()).hexdigest()[:24]}")
    if isinstance(value, str) and value:
        return PromptId("str", value)
    if isinstance(value, int) and not isinstance(value, bool) and _is_int64(value):
        return PromptId("int", str(value))
    if isinstance(value, dict) and len(value) == 1:
        return _typed_id(*next(iter(value.items())))
    raise _wrong('id must be text, a whole number, {"$oid": "…"} or {"$uuid": "…"}')


def _typed_id(kind: object, text: object) -> PromptId:
    """An id in MongoDB's extended JSON (v2): the two kinds that people use."""
    plain = text.lower().replace("-", "") if isinstance(text, str) else ""
    length = {"$oid": 24, "$uuid": 32}.get(str(kind))
    if len(plain) != length or not all(char in "0123456789abcdef" for char in plain):
        raise _wrong('id must be text, a whole number, {"$oid": "24 digits"} or {"$uuid": "32 digits"}')
    if kind == "$oid":
        return PromptId("objectid", plain)
    parts = (plain[:8], plain[8:12], plain[12:16], plain[16:20], plain[20:])
    return PromptId("uuid", "-".join(parts))


def _is_int64(value: int) -> bool:
    return -(2**63) <= value < 2**63


def whole(value: object) -> Any:
    """7.0 is 7, as JSON has but one kind of number; whatever else it is, as it stands."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _wrong(message: str) -> PromptFailed:
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, message)


log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 2**20
"""Bytes; what is longer is not read."""
MAX_ID_CHARS: Final = 500
"""Characters of a generation_id."""
_RENAMED: Final = {"generation_id": "id", "prompt": "text", "lora_model_url": "lora"}
_KNOWN: Final = {*FIELDS, *_RENAMED} - {"id", "_id", "status"}


class MessageReader:
    """Reads messages. Those without a ``dataset_id`` get the one given here, if any."""

    def __init__(self, dataset_id: str | None = None) -> None:
        self._dataset_id = dataset_id

    def __call__(self, body: bytes) -> tuple[NewPrompt | None, list[str]]:
        """The prompt and nothing else, or None and a sentence for each thing that is wrong."""
        if len(body) > MAX_BODY_BYTES:
            return None, [
                f"the message has {len(body):,} bytes; it must not have more than {MAX_BODY_BYTES:,}"
            ]
        try:
            message = json.loads(body.decode("utf-8-sig"))
        except UnicodeDecodeError as exc:
            return None, [f"the message is no UTF-8 text (byte {exc.start})"]
        except (ValueError, RecursionError) as exc:
            return None, [f"the message is no JSON: {str(exc).splitlines()[0]}"]
        if not isinstance(message, dict):
            return None, [f"the message must be a JSON object, not {type(message).__name__}"]
        return self._prompt({name: value for name, value in message.items() if value is not None})

    def _prompt(self, message: dict[str, Any]) -> tuple[NewPrompt | None, list[str]]:
        if unknown := sorted(message.keys() - _KNOWN):
            log.debug("fields of a message that mean nothing here: %s", ", ".join(unknown)[:300])
        complaints = [
            f"{name} and {other} are the same; give one of them"
            for name, other in _RENAMED.items()
            if name in message and other in message and other in _KNOWN
        ]
        complaints += _wrong_id(message.get("generation_id"))
        entry = {_RENAMED.get(name, name): value for name, value in message.items() if name in _KNOWN}
        if "lora_model_url" in message:
            entry["lora"] = {"path": message["lora_model_url"]}
        if self._dataset_id is not None:
            entry.setdefault("dataset_id", self._dataset_id)
        if complaints:
            entry.pop("id", None)  # it has been judged already
        prompt, invalid_value = new_prompt(entry)
        return (None if complaints else prompt), complaints + invalid_value


def _wrong_id(value: object) -> list[str]:
    """What is wrong with a generation_id: text or a whole number, since it names the prompt for ever."""
    if value is None:
        return ["generation_id is missing; give each generation an id of its own"]
    if isinstance(value, int) and not isinstance(value, bool):
        return [] if -(2**63) <= value < 2**63 else ["generation_id is too large a number"]
    try:
        text = check_text("generation_id", value)
    except PromptFailed as exc:
        return [str(exc)]
    if not 0 < len(text) <= MAX_ID_CHARS:
        return [f"generation_id must have 1 to {MAX_ID_CHARS} characters; it has {len(text):,}"]
    return []
