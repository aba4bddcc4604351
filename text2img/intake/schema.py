"""The JSON Schema (draft 2020-12) of a file of prompts, built from the limits that validation uses."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from text2img.intake.entries import MAX_PRIORITY
from text2img.prompts.ids import MAX_URL_CHARS, URL_PATTERN
from text2img.prompts.parameters import (
    ASPECT_RATIOS,
    FORMATS,
    MAX_IMAGES,
    MAX_LORAS,
    MAX_NAME_CHARS,
    MAX_PATH_CHARS,
    MAX_TEXT_CHARS,
    MAX_WEIGHT,
    POSITIONS,
    SCHEDULERS,
    is_control_character,
    is_invisible,
)

if TYPE_CHECKING:
    from collections.abc import Callable

_INT64: Final = 2**63
_END_OF_TEXT: Final = "(?![\\s\\S])"
"""Matches the end of a text, in Python and in JavaScript: Python's $ also matches before a final newline."""
_NO_NUL: Final = {"not": {"pattern": "\\u0000"}}
_VISIBLE: Final = {"$ref": "#/$defs/visible"}
_LABEL: Final = {
    "anyOf": [
        {"type": "string", "maxLength": MAX_TEXT_CHARS, **_NO_NUL},
        {"type": "integer", "minimum": -_INT64, "maximum": _INT64 - 1},
    ]
}


def schema() -> dict[str, Any]:
    """Return the schema of a JSON or YAML file; ``#/$defs/prompt`` is the schema of a JSON line."""
    prompts = {"type": "array", "items": {"$ref": "#/$defs/entry"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Prompts for text2img",
        "anyOf": [
            prompts,
            {"type": "object", "properties": {"prompts": prompts}, "required": ["prompts"]},
        ],
        "$defs": {
            "entry": {"anyOf": [{"$ref": "#/$defs/text"}, {"$ref": "#/$defs/prompt"}]},
            "text": {**_text(), "allOf": [_VISIBLE], "description": "what the image should show"},
            "visible": {"type": "string", "pattern": f"[^{_ranges(is_invisible)}]"},
            "prompt": _prompt(),
            "lora": _lora(),
        },
    }


def _prompt() -> dict[str, Any]:
    fields = {name: _or_null(field) for name, field in _fields().items()}
    not_null = {"not": {"type": "null"}}
    some = [
        {"required": [name], "properties": {name: not_null}} for name in ("text", "prompt", "prompt_tags")
    ]
    return {
        "type": "object",
        "properties": fields,
        "additionalProperties": False,
        "not": {"anyOf": [_both("id", "_id"), _both("text", "prompt")]},
        "anyOf": some,
    }


def _both(*names: str) -> dict[str, Any]:
    """Return the schema of an object that has all of these fields, none of them null."""
    return {"required": list(names), "properties": {name: {"not": {"type": "null"}} for name in names}}


def _fields() -> dict[str, dict[str, Any]]:
    """Return each field's schema, without null, which is the same as omitting the field."""
    prompt_id = {
        "description": "the prompt's id; the default is derived from the content",
        "anyOf": [
            {"type": "string", "minLength": 1},
            _integer(-_INT64, _INT64 - 1),
            _extended_json_id("$oid", f"^(-*[0-9a-fA-F]){{24}}-*{_END_OF_TEXT}"),
            _extended_json_id("$uuid", f"^(-*[0-9a-fA-F]){{32}}-*{_END_OF_TEXT}"),
        ],
    }
    pixels = {**_integer(64, 4096), "multipleOf": 8, "description": "pixels"}
    return {
        "id": prompt_id,
        "_id": {"$ref": "#/$defs/prompt/properties/id"},
        "text": {"$ref": "#/$defs/text"},
        "prompt": {"$ref": "#/$defs/text"},
        "prompt_tags": {
            "description": "joined by spaces if there is no text",
            "type": "array",
            "items": {"type": "string", **_NO_NUL},
            "contains": _VISIBLE,
        },
        "webhook_url": {"type": "string", "maxLength": MAX_URL_CHARS, "pattern": URL_PATTERN, **_NO_NUL},
        **dict.fromkeys(("dataset_id", "style_id"), _LABEL),
        "priority": {
            "type": "number",
            "minimum": -MAX_PRIORITY,
            "maximum": MAX_PRIORITY,
            "description": "higher comes first",
        },
        "status": {"const": "pending"},
        "negative_prompt": _text(),
        "seed": _integer(0, _INT64 - 1),
        "num_inference_steps": _integer(1, 1000),
        "guidance_scale": {"type": "number", "minimum": 0, "maximum": 100},
        "true_cfg_scale": {"type": "number", "minimum": 0, "maximum": 100},
        "width": pixels,
        "height": pixels,
        "aspect_ratio": {"enum": list(ASPECT_RATIOS)},
        "num_images": _integer(1, MAX_IMAGES),
        "lora": {
            "anyOf": [
                {"$ref": "#/$defs/lora"},
                {"type": "array", "items": {"$ref": "#/$defs/lora"}, "maxItems": MAX_LORAS},
            ]
        },
        "scheduler": {"enum": list(SCHEDULERS)},
        "artist_name": {
            "type": "string",
            "maxLength": MAX_NAME_CHARS,
            "pattern": f"^[^{_ranges(is_control_character)}]*{_END_OF_TEXT}",
            "description": "signs the image",
        },
        "signature_position": {"enum": list(POSITIONS)},
        "signature_opacity": _integer(0, 255),
        "image_format": {"enum": list(FORMATS)},
        "image_quality": _integer(1, 100),
    }


def _lora() -> dict[str, Any]:
    fields: dict[str, dict[str, Any]] = {
        "weight": {"type": "number", "minimum": -MAX_WEIGHT, "maximum": MAX_WEIGHT},
        "sha256": {"type": "string", "pattern": f"^[0-9a-fA-F]{{64}}{_END_OF_TEXT}"},
        "size": {**_integer(1, 2**40), "description": "bytes"},
    }
    path = {"type": "string", "maxLength": MAX_PATH_CHARS, "pattern": "\\S", "description": "its location"}
    return {
        "type": "object",
        "properties": {"path": path, **{name: _or_null(field) for name, field in fields.items()}},
        "required": ["path"],
        "additionalProperties": False,
    }


def _ranges(includes: Callable[[str], bool]) -> str:
    """Return the characters for which the function is true, as ranges of a regular expression's class."""
    codes = {code for code in range(sys.maxunicode + 1) if includes(chr(code))}
    starts = sorted(code for code in codes if code - 1 not in codes)
    ends = sorted(code for code in codes if code + 1 not in codes)
    return "".join(f"{chr(start)}-{chr(end)}" for start, end in zip(starts, ends, strict=True))


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [field, {"type": "null"}]}


def _integer(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def _text() -> dict[str, Any]:
    return {"type": "string", "maxLength": MAX_TEXT_CHARS, **_NO_NUL}


def _extended_json_id(kind: str, pattern: str) -> dict[str, Any]:
    """Return the schema of an id in MongoDB's extended JSON."""
    return {
        "type": "object",
        "properties": {kind: {"type": "string", "pattern": pattern}},
        "required": [kind],
        "additionalProperties": False,
    }
