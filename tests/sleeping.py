"""``text2img`` whose workers, in processes of their own, draw with an engine that sleeps and needs no torch.

Started as ``python -m tests.sleeping ARGUMENTS``. The text of a prompt may ask for trouble: ``kill`` ends the
worker's process by SIGKILL while it is on the device, ``break all`` fails each worker that has it, ``break
one`` the first.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from unittest.mock import patch

from benchmarks.stub import StubEngine
from text2img import cli
from text2img.cli import crew, parts, share
from text2img.errors import DeviceFailed


class Engine(StubEngine):
    """Sleeps SECONDS_A_PICTURE."""

    def __init__(self):
        super().__init__(64, float(os.environ.get("SECONDS_A_PICTURE", "0.1")))

    def generate(self, batch, on_step):
        if any("kill" in request.text for request in batch):
            os.kill(os.getpid(), signal.SIGKILL)
        for request in batch:
            if "break all" in request.text or ("break one" in request.text and _first()):
                raise DeviceFailed("the device is broken")
        return super().generate(batch, on_step)


def _first():
    """Whether no worker was asked this before, in this folder."""
    try:
        Path("broken").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def work(part, line):
    """What a worker's process runs."""
    with patch.object(parts, "engine", lambda *_: Engine()):
        share.work(part, line)


def main():
    from tests import sleeping  # by its name, not as __main__: the workers import it

    with patch.object(crew, "work", sleeping.work):
        return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
