"""A message's body → a new prompt, or everything that is wrong with it. Knows no broker and no database."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import PromptFailed
from text2img.intake.entries import FIELDS, new_prompt
from text2img.prompts.validation import check_text

if TYPE_CHECKING:
    from text2img.databases import NewPrompt

log = logging.getLogger(__name__)

LONGEST_BODY: Final = 2**20
"""Bytes; what is longer is not read."""
LONGEST_ID: Final = 500
"""Characters of a generation_id."""
_RENAMED: Final = {"generation_id": "id", "prompt": "text", "lora_model_url": "lora"}
_KNOWN: Final = {*FIELDS, *_RENAMED} - {"id", "_id", "status"}


class Reader:
    """Reads messages. Those without a ``dataset_id`` get the one given here, if any."""

    def __init__(self, dataset_id: str | None = None) -> None:
        self._dataset_id = dataset_id

    def __call__(self, body: bytes) -> tuple[NewPrompt | None, list[str]]:
        """The prompt and nothing else, or None and a sentence for each thing that is wrong."""
        if len(body) > LONGEST_BODY:
            return None, [f"the message has {len(body):,} bytes; it must not have more than {LONGEST_BODY:,}"]
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
        prompt, wrong = new_prompt(entry)
        return (None if complaints else prompt), complaints + wrong


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
    if not 0 < len(text) <= LONGEST_ID:
        return [f"generation_id must have 1 to {LONGEST_ID} characters; it has {len(text):,}"]
    return []
