"""What a file of prompts may hold, as a JSON Schema (draft 2020-12), made from the values the checks use."""

from __future__ import annotations

import sys
from typing import Any, Final

from text2img.intake.entries import MAX_PRIORITY
from text2img.prompts.parameters import (
    ASPECT_RATIOS,
    FORMATS,
    MAX_IMAGES,
    MAX_LORAS,
    MAX_PATH_CHARS,
    MAX_WEIGHT,
    POSITIONS,
    SCHEDULERS,
)
from text2img.prompts.validation import MAX_NAME_CHARS, MAX_TEXT_CHARS, is_control_character
from text2img.prompts.webhook_urls import FORM, MAX_URL_CHARS

_INT64: Final = 2**63
_END: Final = "(?![\\s\\S])"
"""The end of a text, in Python and in JavaScript: Python's $ also matches before a newline there."""
_PLAIN: Final = {"not": {"pattern": "\\u0000"}}
_LABEL: Final = {
    "anyOf": [
        {"type": "string", "maxLength": MAX_TEXT_CHARS, **_PLAIN},
        {"type": "integer", "minimum": -_INT64, "maximum": _INT64 - 1},
    ]
}
_DRAWABLE: Final = {"type": "string", "maxLength": MAX_TEXT_CHARS, "pattern": "\\S", **_PLAIN}


def schema() -> dict[str, Any]:
    """The schema of a whole JSON or YAML file; ``#/$defs/prompt`` is that of a line of JSON lines."""
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
            "text": {**_DRAWABLE, "description": "what the picture shall show"},
            "prompt": _prompt(),
            "lora": _lora(),
        },
    }


def _prompt() -> dict[str, Any]:
    fields = {name: _or_null(field) for name, field in _fields().items()}
    given = {"not": {"type": "null"}}
    some_text = {"required": ["text"], "properties": {"text": given}}
    some_tags = {"required": ["prompt_tags"], "properties": {"prompt_tags": given}}
    return {
        "type": "object",
        "properties": fields,
        "additionalProperties": False,
        "not": {"required": ["id", "_id"], "properties": {"id": given, "_id": given}},
        "anyOf": [some_text, some_tags],
    }


def _fields() -> dict[str, dict[str, Any]]:
    """Each field's own schema, where it is given at all; null says the same as leaving it out."""
    ident = {
        "description": "the prompt's id; without one it is made from the content",
        "anyOf": [
            {"type": "string", "minLength": 1},
            _integer(-_INT64, _INT64 - 1),
            _typed("$oid", f"^(-*[0-9a-fA-F]){{24}}-*{_END}"),
            _typed("$uuid", f"^(-*[0-9a-fA-F]){{32}}-*{_END}"),
        ],
    }
    pixels = {**_integer(64, 4096), "multipleOf": 8, "description": "pixels"}
    return {
        "id": ident,
        "_id": {"$ref": "#/$defs/prompt/properties/id"},
        "text": {"$ref": "#/$defs/text"},
        "prompt_tags": {
            "description": "joined by spaces where there is no text",
            "type": "array",
            "items": {"type": "string", **_PLAIN},
            "contains": {"type": "string", "pattern": "\\S"},
        },
        "webhook_url": {"type": "string", "maxLength": MAX_URL_CHARS, "pattern": FORM, **_PLAIN},
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
            "pattern": f"^[^{_steering()}]*{_END}",
            "description": "signs the picture",
        },
        "signature_position": {"enum": list(POSITIONS)},
        "signature_opacity": _integer(0, 255),
        "image_format": {"enum": list(FORMATS)},
        "image_quality": _integer(1, 100),
    }


def _lora() -> dict[str, Any]:
    fields: dict[str, dict[str, Any]] = {
        "weight": {"type": "number", "minimum": -MAX_WEIGHT, "maximum": MAX_WEIGHT},
        "sha256": {"type": "string", "pattern": f"^[0-9a-fA-F]{{64}}{_END}"},
        "size": {**_integer(1, 2**40), "description": "bytes"},
    }
    path = {"type": "string", "maxLength": MAX_PATH_CHARS, "pattern": "\\S", "description": "where it is"}
    return {
        "type": "object",
        "properties": {"path": path, **{name: _or_null(field) for name, field in fields.items()}},
        "required": ["path"],
        "additionalProperties": False,
    }


def _steering() -> str:
    """What no name may hold, as the ranges of a regular expression's class."""
    found = [code for code in range(sys.maxunicode + 1) if is_control_character(chr(code))]
    starts = [code for code in found if code - 1 not in found]
    ends = [code for code in found if code + 1 not in found]
    return "".join(f"{chr(start)}-{chr(end)}" for start, end in zip(starts, ends, strict=True))


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [field, {"type": "null"}]}


def _integer(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def _text() -> dict[str, Any]:
    return {"type": "string", "maxLength": MAX_TEXT_CHARS, **_PLAIN}


def _typed(kind: str, pattern: str) -> dict[str, Any]:
    """An id in MongoDB's extended JSON."""
    return {
        "type": "object",
        "properties": {kind: {"type": "string", "pattern": pattern}},
        "required": [kind],
        "additionalProperties": False,
    }
