"""Writes the options into ``.env.local.example``: ``python -m tests.env_example``.

What stands above the first heading and from the variables of libraries on is left as it is.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from text2img.settings import options

PATH = Path(__file__).parents[1] / ".env.local.example"
_LIBRARIES = "### Variables of libraries"
_TITLES = {
    "database": "Database: one of the first three is required",
    "output": "Output: one of GCS_BUCKET, S3_BUCKET, OUTPUT_URL and OUTPUT_DIR is required",
    "callback": "Callback and webhooks",
    "selection": "Which prompts",
    "input": "Input file",
    "generator": "A hosted generator in place of a model",
    "generation": "Parameters of images whose prompt does not set them, and limits",
    "image": "Image files",
    "distributed": "Several workers",
    "serving": "The command serve",
    "verification": "The command verify",
    "logging": "Logs",
}


def lines(option) -> str:
    """The option's lines: its meaning, flag and default, then the variable with the default."""
    meaning = f"{option.meaning[0].upper()}{option.meaning[1:]}"
    text = f"{meaning} ({option.flag}; default: {option.default_shown})"
    wrapped = textwrap.wrap(
        text, 108, initial_indent="# ", subsequent_indent="# ", break_long_words=False, break_on_hyphens=False
    )
    value = "" if option.default is None else "no" if option.default is False else option.default
    return "\n".join([*wrapped, f"{'' if value == '' else '#'}{option.variable}={value}"])


def updated(text: str) -> str:
    """The file's text with the options as they are in the code now."""
    head, _, rest = text.partition("### ")
    parts, groups = [head], {}
    for option in options():
        groups.setdefault(option.group, []).append(option)
    for group, members in groups.items():
        title = _TITLES.get(group, group.capitalize())
        parts += [f"### {title}\n\n", *(f"{lines(option)}\n\n" for option in members)]
    return "".join([*parts, _LIBRARIES, rest.partition(_LIBRARIES)[2]])


if __name__ == "__main__":
    PATH.write_text(updated(PATH.read_text(encoding="utf-8")), encoding="utf-8")
