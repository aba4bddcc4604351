"""Files of prompts → new prompts, all of them checked before the first is added. Knows no database.

``formats`` turns a file's text into entries, each with its line; ``entries`` turns one into a new prompt, or
says all that is wrong with it; ``schema`` writes down what an entry may hold.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from text2img.errors import ConfigurationError
from text2img.intake.entries import new_prompt
from text2img.intake.formats import entries, format_of, guess

if TYPE_CHECKING:
    from text2img.databases import NewPrompt
    from text2img.prompts import PromptId

_SHOWN = 50


def read_prompts(path: str) -> list[NewPrompt]:
    """The prompts of a file (``-``: standard input, its format found by looking at it).

    Raises ConfigurationError with a line for each thing that is wrong: the file, the line and the field.
    """
    if path == "-":
        name, text = "standard input", _standard_input()
        kind = guess(text)
    else:
        name, kind = path, format_of(path)
        text = _read(path)
    prompts: dict[PromptId, NewPrompt] = {}
    wrong: list[str] = []
    for line, entry in entries(kind, text, name):
        prompt, complaints = new_prompt(entry)
        if prompt is not None and prompts.setdefault(prompt.id, prompt) != prompt:
            complaints = [f"id {prompt.id} stands above already, with other content"]
        wrong += [f"{name}, line {line}: {complaint}" for complaint in complaints]
    if wrong:
        more = f"\n… and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ConfigurationError("\n".join(wrong[:_SHOWN]) + more)
    return list(prompts.values())


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise ConfigurationError(f"{path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"{path} is no UTF-8 text (byte {exc.start})") from exc


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ConfigurationError(f"standard input is no UTF-8 text (byte {exc.start})") from exc
