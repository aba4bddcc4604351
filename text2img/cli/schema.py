"""``schema``: print the JSON Schema of a file of prompts, for editors and other programs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from text2img.intake.schema import schema
from text2img.telemetry.terminal import print_document

if TYPE_CHECKING:
    import argparse

    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Print the schema, and return the exit status."""
    del settings, arguments, progress
    print_document(json.dumps(schema(), indent=2))
    return 0
