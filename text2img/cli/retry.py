"""``retry``: puts failed prompts back to pending, as if they had never been tried."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from text2img.cli import parts
from text2img.errors import ConfigurationError, ErrorCode

if TYPE_CHECKING:
    import argparse

    from text2img.progress import Progress
    from text2img.settings import Settings


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Put them back; the exit status."""
    del progress
    code = _code(arguments.error_code)
    with closing(parts.database(settings, create=False)) as database:  # a file that is not there is a slip
        database.open()
        again = database.retry(code, parts.selection(settings))
    print(f"put {again} failed prompts back to pending")
    return 0


def _code(text: str | None) -> ErrorCode | None:
    try:
        return None if text is None else ErrorCode(text)
    except ValueError:
        known = ", ".join(ErrorCode)
        raise ConfigurationError(f"--error-code must be one of {known}; it is {text!r}") from None
