"""Servers that the tests start on free loopback ports, each a process of its own, and stop again."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest

from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_RAY_BELOW = 20_000  # Ray gives the ports from 10,002 on to its workers, and refuses one of these for itself
_OUTGOING_FROM = 32_768  # Linux's first port for outgoing connections; other systems begin higher


def unavailable(reason: str) -> NoReturn:
    """Skip the test with the reason on a developer's machine; fail it in CI, where all services must be."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def free_port() -> int:
    """A loopback port that no process uses, from below those that the system gives to outgoing connections.

    A server takes seconds until it listens: a port that the system itself chose could by then belong to
    a connection of another test.
    """
    while True:
        port = random.SystemRandom().randrange(_RAY_BELOW, _OUTGOING_FROM)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def running(name: str, arguments: Sequence[str], folder: Path, answers: Callable[[], bool]) -> Iterator[None]:
    """A server's process, found beside this Python, from when it answers until the block is left."""
    program = Path(sys.executable).with_name(name)
    found = str(program) if program.exists() else shutil.which(name)
    if not found:
        unavailable(f"{name} is not installed; pip install -e '.[test]'")
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen([found, *arguments], stdout=log, stderr=subprocess.STDOUT)
        try:
            until(lambda: process.poll() is not None or answers())
            if process.poll() is not None:
                unavailable(f"{name} did not come up (exit status {process.poll()})")
            yield
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
