"""Files of prompts → new prompts, all of them checked before the first is added.

JSON (a list), JSON lines, YAML (a list), CSV (a header) and plain text (a prompt a line). Everything that is
wrong is reported at once, by file, line or entry, and field. Knows no database.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from text2img.databases import NewPrompt
from text2img.errors import ConfigurationError, PromptFailed
from text2img.prompts import PromptId, Wishes
from text2img.prompts.checks import check_number, check_prompt_text, check_text, nearest
from text2img.prompts.parameters import PARAMETER_NAMES, settle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Entries = Iterable[tuple[str, object]]

FIELDS = (
    "id",
    "_id",
    "text",
    "prompt_tags",
    "webhook_url",
    "dataset_id",
    "priority",
    "status",
    *PARAMETER_NAMES,
)
_DEFAULTS = Wishes(num_inference_steps=50, guidance_scale=7.5, width=512, height=512)
_WHOLE = (
    "seed",
    "num_inference_steps",
    "width",
    "height",
    "num_images",
    "signature_opacity",
    "image_quality",
)
_REAL = ("guidance_scale", "priority")
_JSON = ("lora", "prompt_tags")


def read_prompts(path: str) -> list[NewPrompt]:
    """The prompts of a file (``-``: standard input, its format found by looking at it).

    Raises ConfigurationError with a line for each thing that is wrong.
    """
    if path == "-":
        name, text = "standard input", _standard_input()
        parse = _parser(_guess(text))
    else:
        parse = _parser(Path(path).suffix.lower())
        name, text = path, _read(path)
    prompts: dict[PromptId, NewPrompt] = {}
    wrong: list[str] = []
    for where, entry in _parsed(parse, text, name):
        try:
            prompt = _prompt(entry)
        except PromptFailed as exc:
            wrong.append(f"{name}, {where}: {exc}")
            continue
        known = prompts.setdefault(prompt.id, prompt)
        if known != prompt:
            wrong.append(f"{name}, {where}: id {prompt.id} stands above already, with other content")
    if wrong:
        more = f"\n… and {len(wrong) - 50} more" if len(wrong) > 50 else ""
        raise ConfigurationError("\n".join(wrong[:50]) + more)
    return list(prompts.values())


def _prompt(entry: object) -> NewPrompt:
    if isinstance(entry, str):
        entry = {"text": entry}
    if not isinstance(entry, dict):
        raise _wrong(f"must be a mapping with text, not {type(entry).__name__}")
    for field in entry:
        if field not in FIELDS:
            raise _wrong(f"unknown field {str(field)[:60]!r}{nearest(str(field), FIELDS)}")
    text = check_prompt_text(entry.get("text"), entry.get("prompt_tags"))
    if entry.get("status") not in {None, "pending"}:
        raise _wrong(f"status is {str(entry['status'])[:40]!r}; a new prompt is pending")
    wishes = Wishes.of(entry)
    settle((wishes, _DEFAULTS), seed=0)
    webhook = entry.get("webhook_url")
    if webhook is not None:
        check_text("webhook_url", webhook)
    priority, dataset = entry.get("priority"), entry.get("dataset_id")
    if priority is not None:
        priority = check_number("priority", priority, -1e9, 1e9)
    if isinstance(dataset, bool) or not isinstance(dataset, str | int | None):
        raise _wrong("dataset_id must be text or a whole number")
    return NewPrompt(
        id=_id(entry), text=text, wishes=wishes, dataset_id=dataset, priority=priority, webhook_url=webhook
    )


def _id(entry: dict[Any, Any]) -> PromptId:
    """The entry's id; one made from the content where it has none, the same for the same content."""
    value = entry.get("id", entry.get("_id"))
    if value is None:
        content = json.dumps(entry, sort_keys=True, ensure_ascii=True)
        return PromptId("str", f"p-{hashlib.sha256(content.encode()).hexdigest()[:24]}")
    if isinstance(value, str) and value:
        return PromptId("str", value)
    if isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63:
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


def _wrong(sentence: str) -> PromptFailed:
    from text2img.errors import ErrorCode

    return PromptFailed(ErrorCode.INVALID_PARAMETERS, sentence)


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


def _guess(text: str) -> str:
    start = text.lstrip()
    beginnings = {"[": ".json", "{": ".jsonl", "- ": ".yaml"}
    return next((suffix for begins, suffix in beginnings.items() if start.startswith(begins)), ".txt")


def _parser(suffix: str) -> Callable[[str], Entries]:
    parsers = {
        ".json": _json,
        ".jsonl": _json_lines,
        ".yaml": _yaml,
        ".yml": _yaml,
        ".csv": _csv,
        ".txt": _text,
    }
    if suffix not in parsers:
        raise ConfigurationError(f"the file's name must end in one of {', '.join(parsers)}")
    return parsers[suffix]


def _parsed(parse: Callable[[str], Entries], text: str, name: str) -> Iterator[tuple[str, object]]:
    import yaml

    try:
        yield from parse(text)
    except yaml.MarkedYAMLError as exc:
        line = exc.problem_mark.line + 1 if exc.problem_mark else 1
        raise ConfigurationError(f"{name}, line {line}: {exc.problem}") from exc
    except (ValueError, csv.Error, yaml.YAMLError, RecursionError) as exc:
        raise ConfigurationError(f"{name}: {str(exc).splitlines()[0]}") from exc


def _json(text: str) -> Entries:
    return _list(json.loads(text))


def _yaml(text: str) -> Entries:
    import yaml

    return _list(yaml.safe_load(text))


def _list(loaded: object) -> Entries:
    """A list, or a mapping with the list under ``prompts``."""
    if isinstance(loaded, dict) and "prompts" in loaded:
        loaded = loaded["prompts"]
    if not isinstance(loaded, list):
        raise ValueError("must hold a list of prompts")  # noqa: TRY004 - a wrong value of a file, no type
    return ((f"entry {number}", entry) for number, entry in enumerate(loaded, 1))


def _json_lines(text: str) -> Entries:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as exc:
                raise ValueError(f"line {number} is no JSON: {exc}") from exc


def _csv(text: str) -> Entries:
    """Rows by their header; an empty cell asks for nothing, a number is read as one where one belongs."""
    reader = csv.DictReader(io.StringIO(text), strict=True)
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(f"line {reader.line_num} has another number of cells than the header")
        yield f"line {reader.line_num}", {name: _cell(name, cell) for name, cell in row.items() if cell != ""}


def _cell(name: str, cell: str) -> object:
    """A cell's value: what no number, or no JSON, can be read from stays text, for the check to name it."""
    try:
        if name in _WHOLE:
            return int(cell)
        if name in _REAL:
            return float(cell)
        return json.loads(cell) if name in _JSON else cell
    except (ValueError, RecursionError):
        return math.nan if cell.lower() == "nan" else cell


def _text(text: str) -> Entries:
    """A prompt a line; empty lines and lines that begin with ``#`` are passed over."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield f"line {number}", line.strip()
