"""Conversion of a file's entries and of messages to new prompts, or to a list of their errors."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

from text2img.databases import NewPrompt
from text2img.errors import ErrorCode, PromptFailed
from text2img.intake.formats import NESTED_TOO_DEEPLY, JsonDecoder, Unreadable, repeated_keys
from text2img.prompts import PromptId, RequestedParameters
from text2img.prompts.ids import check_form
from text2img.prompts.parameters import (
    PARAMETER_NAMES,
    check_number,
    check_prompt_text,
    check_text,
    resolve_parameters,
)
from text2img.prompts.quoting import quoted
from text2img.prompts.syntax import name_hint, our_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    _Value = TypeVar("_Value")

FIELDS: Final = (
    *("id", "_id", "text", "prompt", "prompt_tags", "webhook_url", "dataset_id", "style_id"),
    *("priority", "status"),
    *PARAMETER_NAMES,
)
_MAX_UNKNOWN_SHOWN: Final = 10
_DEFAULTS: Final = RequestedParameters(num_inference_steps=50, guidance_scale=7.5, width=512, height=512)
MAX_PRIORITY: Final = 1e9
"""A priority lies between the negative of this and this."""


def new_prompt(entry: object) -> tuple[NewPrompt | None, list[str]]:
    """Return the prompt of an entry and no errors, or None and a message for each invalid field.

    Never raises: whatever goes wrong with an entry is its own error.
    """
    if isinstance(entry, Unreadable):
        return None, list(entry.errors)
    try:
        return _new_prompt(entry)
    except Exception as exc:  # noqa: BLE001 - of values that no check expects; the other entries are read
        return None, [f"cannot be read ({type(exc).__name__})"]


def _new_prompt(entry: object) -> tuple[NewPrompt | None, list[str]]:
    if isinstance(entry, str):
        entry = {"text": entry}
    if not isinstance(entry, dict):
        return None, [f"must be a mapping with text, not {type(entry).__name__}"]
    collector = _ErrorCollector()
    unknown = [field for field in entry if field not in FIELDS]
    for field in unknown[:_MAX_UNKNOWN_SHOWN]:
        collector.errors.append(f"unknown field {quoted(field)}{name_hint(field, FIELDS)}")
    if len(unknown) > _MAX_UNKNOWN_SHOWN:
        collector.errors.append(f"{len(unknown) - _MAX_UNKNOWN_SHOWN:,} more unknown fields")
    entry = _with_text(collector, entry)
    text = _check_text(collector, entry)
    webhook = collector.run(_check_webhook, entry)
    labels = {name: collector.run(_check_label, entry, name) for name in ("dataset_id", "style_id")}
    priority = collector.run(_check_priority, entry)
    collector.run(_check_status, entry)
    requested = _check_parameters(collector, entry)
    # Last: an unchecked entry may contain itself, or keys that cannot be serialized.
    prompt_id = collector.run(_check_id, entry, generate=not collector.errors)
    if text is None or prompt_id is None or collector.errors:
        return None, collector.errors
    prompt = NewPrompt(
        id=prompt_id, text=text, requested=requested, priority=priority, webhook_url=webhook, **labels
    )
    return prompt, []


class _ErrorCollector:
    """Runs checks and collects their errors."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def run(self, check: Callable[..., _Value], *arguments: Any, **named: Any) -> _Value | None:
        """Return the check's result, or None after adding its error."""
        try:
            return check(*arguments, **named)
        except PromptFailed as exc:
            self.errors.append(str(exc))
            return None


def _with_text(collector: _ErrorCollector, entry: dict[str, Any]) -> dict[str, Any]:
    """Return the entry with its ``prompt`` as ``text``, which is the same field."""
    if "prompt" not in entry:
        return entry
    others = {name: value for name, value in entry.items() if name != "prompt"}
    if entry["prompt"] is None:
        return others
    if entry.get("text") is not None:
        collector.errors.append("text and prompt are the same field; use one of them")
        return others
    return {**others, "text": entry["prompt"]}


def _check_text(collector: _ErrorCollector, entry: Mapping[str, Any]) -> str | None:
    """Return the prompt's text; check the tags even if the text takes precedence."""
    text, tags = entry.get("text"), entry.get("prompt_tags")
    checked = collector.run(check_prompt_text, text, tags)
    if text is not None and tags is not None:
        collector.run(check_prompt_text, None, tags)
    return checked


def _check_parameters(collector: _ErrorCollector, entry: Mapping[str, Any]) -> RequestedParameters:
    """Return the entry's parameters, validated.

    All fields are validated together; on failure each is validated on its own, to report every error. An
    error that no single field explains comes from a combination of two.
    """
    requested = RequestedParameters.of(entry)
    try:
        resolve_parameters((requested, _DEFAULTS), seed=0)
    except PromptFailed as exc:
        before = len(collector.errors)
        for name in PARAMETER_NAMES:
            single = RequestedParameters.of({name: entry.get(name)})
            collector.run(resolve_parameters, (single, _DEFAULTS), seed=0)
        if len(collector.errors) == before:
            collector.errors.append(str(exc))
    return requested


def _check_webhook(entry: Mapping[str, Any]) -> str | None:
    value = entry.get("webhook_url")
    return None if value is None else check_form(value)


def _check_priority(entry: Mapping[str, Any]) -> float | None:
    value = entry.get("priority")
    return None if value is None else check_number("priority", value, -MAX_PRIORITY, MAX_PRIORITY)


def _check_label(entry: Mapping[str, Any], name: str) -> str | int | None:
    """Return a label that groups prompts: text, or a whole number of 64 bits, as databases store it."""
    value = int_if_whole(entry.get(name))
    if isinstance(value, str):
        return check_text(name, value)
    if isinstance(value, bool) or not (value is None or (isinstance(value, int) and _is_int64(value))):
        raise _invalid(f"{name} must be text or a whole number of 64 bits")
    return value


def _check_status(entry: Mapping[str, Any]) -> None:
    if entry.get("status") not in (None, "pending"):
        raise _invalid(f"status is {quoted(entry['status'])}; a new prompt is pending")


def _check_id(entry: Mapping[Any, Any], *, generate: bool) -> PromptId | None:
    """Return the entry's id or, if it has none and ``generate`` is set, one derived from its content.

    The same content gives the same id.
    """
    ids = [entry[name] for name in ("id", "_id") if entry.get(name) is not None]
    if len(ids) > 1:
        raise _invalid("id and _id are the same field; use one of them")
    value = int_if_whole(ids[0]) if ids else None
    if value is None and not generate:
        return None
    if value is None:
        content = json.dumps(entry, sort_keys=True, ensure_ascii=True, default=str)
        return PromptId("str", f"p-{hashlib.sha256(content.encode()).hexdigest()[:24]}")
    if isinstance(value, str) and value:
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise _invalid("id contains a lone surrogate; write plain Unicode")
        return PromptId("str", value)
    if isinstance(value, int) and not isinstance(value, bool) and _is_int64(value):
        return PromptId("int", str(value))
    if isinstance(value, dict) and len(value) == 1:
        return _parse_typed_id(*next(iter(value.items())))
    raise _invalid('id must be text, a whole number, {"$oid": "…"} or {"$uuid": "…"}')


def _parse_typed_id(kind: object, text: object) -> PromptId:
    """Parse an id in MongoDB's extended JSON (v2): an ObjectId or a UUID, the common kinds."""
    digits = text.lower().replace("-", "") if isinstance(text, str) else ""
    length = {"$oid": 24, "$uuid": 32}.get(str(kind))
    if len(digits) != length or not all(char in "0123456789abcdef" for char in digits):
        raise _invalid('id must be text, a whole number, {"$oid": "24 digits"} or {"$uuid": "32 digits"}')
    if kind == "$oid":
        return PromptId("objectid", digits)
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return PromptId("uuid", "-".join(parts))


def _is_int64(value: int) -> bool:
    return -(2**63) <= value < 2**63


def int_if_whole(value: object) -> Any:
    """Return 7 for 7.0, since JSON has only one kind of number; return any other value unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _invalid(message: str) -> PromptFailed:
    return PromptFailed(ErrorCode.INVALID_PARAMETERS, message)


log = logging.getLogger(__name__)

MAX_BODY_BYTES: Final = 2**20
"""A longer message is not read."""
MAX_ID_CHARS: Final = 500
"""The maximum length of a generation_id."""
_FIELD_ALIASES: Final = {"generation_id": "id", "prompt": "text", "lora_model_url": "lora"}
_MAX_HINTS: Final = 100
"""Names of other programs' that are logged; each is logged once."""
_MESSAGE_FIELDS: Final = {*FIELDS, *_FIELD_ALIASES} - {"id", "_id", "status"}


class MessageReader:
    """A parser of messages. ``dataset_id``, if given, is the default for messages without one."""

    def __init__(self, dataset_id: str | None = None) -> None:
        self._dataset_id = dataset_id
        self._hints: set[str] = set()

    def __call__(self, body: bytes) -> tuple[NewPrompt | None, list[str]]:
        """Return the prompt and no errors, or None and a message for each error. Never raises."""
        try:
            return self._read(body)
        except Exception as exc:  # noqa: BLE001 - the message's own failure; the next one is read
            return None, [f"the message cannot be read ({type(exc).__name__})"]

    def _read(self, body: bytes) -> tuple[NewPrompt | None, list[str]]:
        if len(body) > MAX_BODY_BYTES:
            return None, [f"the message has {len(body):,} bytes; the maximum is {MAX_BODY_BYTES:,}"]
        decoder = JsonDecoder()
        try:
            message = decoder.decode(body.decode("utf-8-sig"))
        except UnicodeDecodeError as exc:
            return None, [f"the message is not UTF-8 text (byte {exc.start})"]
        except RecursionError:
            return None, [f"the message is not JSON that can be read: it {NESTED_TOO_DEEPLY}"]
        except ValueError as exc:
            return None, [f"the message is not JSON: {str(exc).splitlines()[0]}"]
        errors = repeated_keys(decoder.repeated)
        if not isinstance(message, dict):
            errors = [f"the message must be a JSON object, not {type(message).__name__}"]
        if errors:
            return None, errors
        return self._parse({name: value for name, value in message.items() if value is not None})

    def _parse(self, message: dict[str, Any]) -> tuple[NewPrompt | None, list[str]]:
        if unknown := sorted(message.keys() - _MESSAGE_FIELDS):
            shown = ", ".join(map(quoted, unknown[:_MAX_UNKNOWN_SHOWN]))
            log.debug("ignoring %d unknown fields of a message: %s", len(unknown), shown)
        misnamed = [name for name in unknown if our_name(name, FIELDS)][:_MAX_UNKNOWN_SHOWN]
        hints = [f"unknown field {quoted(name)}{name_hint(name, FIELDS)}" for name in misnamed]
        for hint in hints:
            if hint not in self._hints and len(self._hints) < _MAX_HINTS:
                self._hints.add(hint)
                log.warning("messages with the %s; it is ignored", hint)
        errors = [
            f"{name} and {other} are the same field; use one of them"
            for name, other in _FIELD_ALIASES.items()
            if name in message and other in message and other in _MESSAGE_FIELDS
        ]
        errors += _generation_id_errors(message.get("generation_id"))
        known = {name: value for name, value in message.items() if name in _MESSAGE_FIELDS}
        entry = {_FIELD_ALIASES.get(name, name): value for name, value in known.items()}
        if "lora_model_url" in message:
            entry["lora"] = {"path": message["lora_model_url"]}
        if self._dataset_id is not None:
            entry.setdefault("dataset_id", self._dataset_id)
        if errors:
            entry.pop("id", None)  # its errors are listed already
        prompt, entry_errors = new_prompt(entry)
        errors += entry_errors
        return (None, errors + hints) if errors else (prompt, [])


def _generation_id_errors(value: object) -> list[str]:
    """Return the errors of a generation_id, which must be text or a whole number: it is the prompt's id."""
    if value is None:
        return ["generation_id is missing; give each generation a unique id"]
    if isinstance(value, int) and not isinstance(value, bool):
        return [] if -(2**63) <= value < 2**63 else ["generation_id is too large a number"]
    try:
        text = check_text("generation_id", value)
    except PromptFailed as exc:
        return [str(exc)]
    if not 0 < len(text) <= MAX_ID_CHARS:
        return [f"generation_id must have 1 to {MAX_ID_CHARS} characters; it has {len(text):,}"]
    return []


@dataclass(frozen=True, slots=True)
class Sender:
    """Who sent an invalid message: the id and the webhook URL, both valid, and the error's code."""

    id: PromptId
    webhook_url: str
    code: ErrorCode


def sender_of(body: bytes) -> Sender | None:
    """Return the sender of a message that became no prompt; None if it has no valid id or no valid URL.

    Never raises. A message that gives its id or its URL twice has no certain sender.
    """
    try:
        if len(body) > MAX_BODY_BYTES:
            return None
        decoder = JsonDecoder()
        message = decoder.decode(body.decode("utf-8-sig"))
        if {"generation_id", "webhook_url"} & set(decoder.repeated):
            return None
        if _generation_id_errors(message["generation_id"]):
            return None
        prompt_id, webhook = (
            _check_id({"id": message["generation_id"]}, generate=False),
            _check_webhook(message),
        )
        if prompt_id is None or webhook is None:
            return None
        return Sender(prompt_id, webhook, _error_code(message))
    except Exception:  # noqa: BLE001 - whatever the message holds; it is a dead letter in any case
        return None


def _error_code(message: Mapping[str, object]) -> ErrorCode:
    """Return the code that the message's prompt would have failed with: its text's first."""
    try:
        check_prompt_text(message.get("prompt", message.get("text")), message.get("prompt_tags"))
    except PromptFailed as exc:
        return exc.code
    return ErrorCode.INVALID_PARAMETERS
