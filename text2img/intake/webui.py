"""Parser of text files: one prompt a line, or what the common web UI writes and reads.

That is a line of ``--prompt "…" --steps 20 …`` (its script "prompts from file"), or an infotext: the prompt,
a line ``Negative prompt: …`` and a line ``Steps: 20, Sampler: Euler a, …``. Both are read as what they mean
there or refused; no part of them becomes a prompt's text.
"""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from text2img.intake.formats import Unreadable, one_line, repeated_keys

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

_SAMPLERS: Final = {
    "euler a": "euler-a",
    "euler": "euler",
    "dpm++ 2m": "dpm++",
    "ddim": "ddim",
    "unipc": "unipc",
    "plms": "pndm",
    "heun": "heun",
    "lcm": "lcm",
}
_NEGATIVE: Final = re.compile(r"Negative prompt:", re.IGNORECASE)
_STEPS: Final = re.compile(r"Steps:\s*\d+,\s*\w[\w /-]*:", re.IGNORECASE)
_INLINE: Final = re.compile(rf"\s(?:{_NEGATIVE.pattern}|{_STEPS.pattern})", re.IGNORECASE)
_PAIR: Final = re.compile(r'\s*(\w[\w /-]*+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_HASHES: Final = re.compile(r"Hashes:\s*\{[^{}]*\},?")
_MAX_SETTINGS_CHARS: Final = 5_000
_IGNORED: Final = frozenset(
    ("Model", "Model hash", "VAE", "VAE hash", "Lora hashes", "TI hashes", "Version", "RNG", "ENSD", "User")
)
"""Settings that describe the origin of an image, or repeat its prompt's text."""
_DEFAULTS: Final = {("Schedule type", "Automatic"), ("Clip skip", "1"), ("Denoising strength", "0")}
_TAGS: Final = {
    "prompt": "text",
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "cfg_scale": "guidance_scale",
    "width": "width",
    "height": "height",
    "seed": "seed",
    "sampler_name": "scheduler",
    "batch_size": "num_images",
    "n_iter": "num_images",
}
_TEXT_TAGS: Final = ("prompt", "negative_prompt")
_LATE_TAG: Final = re.compile(rf"\s--({'|'.join(_TAGS).replace('_', '[_-]')})\s")


def entries(file: TextIO) -> Iterator[tuple[int, object]]:
    """Yield the prompts of a text with their lines; skip empty lines and lines that begin with ``#``."""
    block = _Block()
    for number, line in enumerate(file, 1):
        words = line.strip()
        if words.startswith("#"):
            continue
        if not words:
            yield from block.end()
        elif match := _NEGATIVE.match(words):
            block.negative.append((number, words[match.end() :].strip()))
        elif _STEPS.match(words):
            yield from block.end(words, number)
        elif block.negative:
            block.negative.append((number, words))
        else:
            yield from block.add(number, words)
    yield from block.end()


@dataclass(slots=True)
class _Block:
    """Lines without an empty line between them: prompts, of which the last may be an infotext's.

    ``last`` is the latest line that may be a prompt; ``lines`` is how many there were since the block began.
    """

    last: tuple[int, str] | None = None
    lines: int = 0
    negative: list[tuple[int, str]] = field(default_factory=list)

    def add(self, number: int, words: str) -> Iterator[tuple[int, object]]:
        """Add a line of text; yield the prompts that are complete now."""
        if self.last is not None:
            yield self.last[0], _line_entry(self.last[1])
        self.last = number, words
        self.lines += 1
        if words.startswith("--") or _INLINE.search(words):  # whole by itself
            yield from self.end()

    def end(self, settings: str | None = None, number: int = 0) -> Iterator[tuple[int, object]]:
        """End the block, with the line of an infotext's settings if it has one; yield its last prompt."""
        last, lines, negative = self.last, self.lines, self.negative
        self.last, self.lines, self.negative = None, 0, []
        if last is None:
            if settings is not None or negative:
                at = negative[0][0] if negative else number
                yield at, Unreadable(["belongs to an infotext, but there is no prompt before it"])
            return
        if settings is None and not negative:
            yield last[0], _line_entry(last[1])
            return
        if lines > 1 or (settings is None and len(negative) > 1):
            what = "an infotext's prompt and its negative prompt must have one line each"
            yield last[0], Unreadable([f"{what}, and two infotexts need an empty line between them"])
            return
        text = " ".join(words for _, words in negative) if negative else None
        yield last[0], _infotext(last[1], text, settings)


def _line_entry(words: str) -> object:
    """Return the entry of a single line."""
    if words.startswith("--"):
        return _tagged(words)
    if match := _INLINE.search(words):
        text, rest = words[: match.start()], words[match.start() :].strip()
        negative, settings = None, rest
        if found := _NEGATIVE.match(rest):
            rest = rest[found.end() :]
            start = steps.start() if (steps := _STEPS.search(rest)) else len(rest)
            negative, settings = rest[:start].strip(), rest[start:]
        return _infotext(text.strip(), negative, settings or None)
    if match := _LATE_TAG.search(words):
        return Unreadable([f"--{match[1]} follows text; begin the line with --prompt"])
    return Unreadable([_JSON_HINT]) if _is_json_object(words) else words


_JSON_HINT: Final = "is a line of JSON; name the file .jsonl, or give --format jsonl"


def _is_json_object(words: str) -> bool:
    try:
        return words.startswith("{") and isinstance(json.loads(words), dict)
    except (ValueError, RecursionError):
        return False


def _infotext(text: str, negative: str | None, settings: str | None) -> object:
    """Return the entry of an infotext; settings that no field here corresponds to are refused."""
    entry: dict[str, object] = {"text": text}
    if negative:
        entry["negative_prompt"] = negative
    if settings is None:
        return entry
    if len(settings) > _MAX_SETTINGS_CHARS:
        return Unreadable(
            [f"an infotext's settings must not have more than {_MAX_SETTINGS_CHARS:,} characters"]
        )
    errors = []
    for match in _PAIR.finditer(_HASHES.sub("", settings)):
        name, value = match[1].strip(), match[2].strip().strip('"')
        if name == "Size" and (size := re.fullmatch(r"(\d{1,9})x(\d{1,9})", value)):
            entry |= {"width": int(size[1]), "height": int(size[2])}
        elif tag := {
            "Steps": "steps",
            "CFG scale": "cfg_scale",
            "Seed": "seed",
            "Sampler": "sampler_name",
        }.get(name):
            entry |= _field(tag, value)
        elif name not in _IGNORED and (name, value) not in _DEFAULTS:
            errors.append(f"{one_line(name)} of an infotext has no counterpart here; leave it out")
    return Unreadable(errors) if errors else entry


def _tagged(words: str) -> object:
    """Return the entry of a line of tags, which the web UI splits as a shell does."""
    try:
        parts = shlex.split(words)
    except ValueError as exc:
        return Unreadable([f"the tags cannot be read: {exc}"])
    pairs: list[tuple[str, str]] = []
    while parts:
        tag = parts.pop(0)
        name = tag.removeprefix("--").replace("-", "_")
        if not tag.startswith("--"):
            return Unreadable([f"a tag such as --prompt is missing before {one_line(ascii(tag))}"])
        count = _values_of(name, parts)
        if not count:
            return Unreadable([f"--{one_line(name)} lacks its value"])
        pairs.append((name, " ".join(parts[:count])))
        del parts[:count]
    errors = [
        f"--{one_line(name)} has no counterpart here; leave it out" for name, _ in pairs if name not in _TAGS
    ]
    errors += [
        f"--{error}"
        for error in repeated_keys(n for n, count in Counter(n for n, _ in pairs).items() if count > 1)
    ]
    if errors:
        return Unreadable(errors)
    entry: dict[str, object] = {}
    for name, value in pairs:
        fields = _field(name, value)
        for key, number in fields.items():
            before = entry.get(key, 1)  # images: the batch's size times the number of batches
            whole = isinstance(number, int) and isinstance(before, int)
            entry[key] = number * before if key == "num_images" and whole else number  # type: ignore[operator]
    return entry


def _values_of(name: str, parts: list[str]) -> int:
    """Return how many of the parts are the value of the tag: a text goes on up to the next tag."""
    if name not in _TEXT_TAGS:
        return min(len(parts), 1)
    return next((index for index, part in enumerate(parts) if index and part.startswith("--")), len(parts))


def _field(tag: str, value: str) -> dict[str, object]:
    """Return the field of a tag's value; none for the seed −1, which means any."""
    name = _TAGS[tag]
    if tag in _TEXT_TAGS:
        return {name: value}
    if name == "scheduler":
        return {name: _SAMPLERS.get(value.casefold(), value)}
    if name == "seed" and value == "-1":
        return {}
    if re.fullmatch(r"[-+]?\d{1,30}", value):
        return {name: int(value)}
    return {name: float(value) if re.fullmatch(r"[-+]?\d{0,30}\.\d{1,30}", value) else value}
