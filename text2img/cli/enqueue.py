"""``enqueue FILE``: add the prompts of a file, if all of them are valid."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import TYPE_CHECKING

from text2img.errors import ConfigurationError
from text2img.intake import FORMATS, read_prompts
from text2img.prompts.parameters import nearest
from text2img.telemetry.terminal import print_lines, print_result
from text2img.worker import build

if TYPE_CHECKING:
    import argparse

    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress


log = logging.getLogger("text2img.enqueue")


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Validate the whole file, then add the new prompts; return the exit status."""
    del progress
    syntax = build.prompt_syntax(settings)
    prompts = read_prompts(arguments.file, file_format=_format(arguments.format), syntax=syntax)
    if syntax.warning:
        log.warning("%s", syntax.warning)
    with closing(build.database(settings)) as database:
        added = database.runs.enqueue(prompts)
    present = len(prompts) - added
    print_lines(f"added {added} of {len(prompts)} prompts; {present} were there already")
    print_result({"status": 0, "prompts": len(prompts), "added": added, "present": present})
    return 0


def _format(name: str | None) -> str | None:
    """Return the format that --format names. Raises ConfigurationError for an unknown one."""
    known = None if name is None else name.lower().removeprefix(".").replace("yml", "yaml")
    if name is not None and known not in FORMATS:
        raise ConfigurationError(f"--format must be one of {', '.join(FORMATS)}{nearest(name, FORMATS)}")
    return known
