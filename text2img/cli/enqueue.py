"""``enqueue FILE``: add the prompts of a file, if all of them are valid."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from text2img.intake import read_prompts
from text2img.telemetry.terminal import print_lines
from text2img.worker import build

if TYPE_CHECKING:
    import argparse

    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Validate the whole file, then add the new prompts; return the exit status."""
    del progress
    prompts = read_prompts(arguments.file)
    with closing(build.database(settings)) as database:
        added = database.runs.enqueue(prompts)
    print_lines(f"added {added} of {len(prompts)} prompts; {len(prompts) - added} were there already")
    return 0
