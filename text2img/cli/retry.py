"""``retry``: reset failed prompts to pending, and forget their attempts.

``--callbacks`` reopens the notifications that receivers rejected instead.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from text2img.errors import ConfigurationError, ErrorCode
from text2img.telemetry.terminal import print_lines, print_result
from text2img.worker import build

if TYPE_CHECKING:
    import argparse

    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Reset the failed prompts or reopen the rejected notifications, and return the exit status."""
    del progress
    code = _error_code(arguments.error_code)
    if arguments.callbacks:
        return _reopen(settings, code)
    with closing(build.database(settings, create=False)) as database:  # a missing file is a typing error
        database.connection.open()
        count = database.runs.retry(code, build.selection(settings))
    print_lines(f"reset {count} failed prompts to pending")
    print_result({"status": 0, "reset": count})
    return 0


def _reopen(settings: Settings, code: ErrorCode | None) -> int:
    if code is not None or build.selection(settings).dataset_id is not None:
        raise ConfigurationError(
            "--callbacks reopens all rejected notifications; leave out --error-code and --dataset-id"
        )
    with closing(build.database(settings, create=False)) as database:
        database.connection.open()
        count = database.outbox.reopen_notifications()
    print_lines(f"reopened {count} rejected notifications; the next run sends them")
    print_result({"status": 0, "reopened": count})
    return 0


def _error_code(text: str | None) -> ErrorCode | None:
    try:
        return None if text is None else ErrorCode(text)
    except ValueError:
        known = ", ".join(ErrorCode)
        raise ConfigurationError(f"--error-code must be one of {known}; it is {text!r}") from None
