"""``text2img`` for many command lines, each in a process of its own that is forked from this one.

For tests of what a command says before it works: what Python imports takes ten times as long as the rest, and
is paid for once. Reads a list of ``{"arguments", "folder", "environment"}`` as JSON from standard input, and
writes a list of ``[status, output, errors]``, in that order, to standard output.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
_IMPORTED = (
    "cli.run",
    "cli.serve",
    "cli.status",
    "cli.verify",
    "settings.loader",
    "intake.files",
    "databases.sqlite",
)


def main():
    sys.path[0] = str(ROOT)
    for name in _IMPORTED:
        import_module(f"text2img.{name}")
    json.dump([_finished(**case) for case in json.load(sys.stdin)], sys.stdout)


def _finished(arguments, folder, environment):
    """Return the status, the output and the errors of one command."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = os.fork()
        if process == 0:
            os._exit(_work(arguments, folder, environment, (output, errors)))
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read())
    return [status, *texts]


def _work(arguments, folder, environment, streams):
    """Run the command in this process, and return its status."""
    from text2img import cli

    with open(os.devnull) as nothing:  # noqa: PTH123 - a descriptor is all that is wanted
        for ours, theirs in enumerate((nothing, *streams)):
            os.dup2(theirs.fileno(), ours)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    try:
        status = cli.main(arguments)
    except SystemExit as exc:
        status = exc.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    main()
