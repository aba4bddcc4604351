"""How soon SIGTERM is heard while a call into C runs, by where Python learns of it and by what is called.

    python -m benchmarks.signals

Each row is a process of its own. The call takes some seconds, and the signal comes one second after its
start; a signal that is heard when the call returns is heard as late as the call ends.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from text2img.concurrency.signals import Stop, graceful_shutdown

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_WAYS: Final = ("a handler", "a handler, the call in a thread", "wakeup fd and a listener")
_CALLS: Final = ("lock released", "torch", "lock held")
_KILL: Final = "import os, sys, time; time.sleep(1); print(time.monotonic()); os.kill(int(sys.argv[1]), 15)"


def main() -> None:
    """Print the table, or measure one row in this process."""
    if len(sys.argv) > 1:
        print(_measure(_WAYS[int(sys.argv[1])], _CALLS[int(sys.argv[2])]))
        return
    print("| way | call | it takes | heard after |\n|---|---|---|---|")
    for (way, how), (call, what) in itertools.product(enumerate(_WAYS), enumerate(_CALLS)):
        row = [sys.executable, "-m", "benchmarks.signals", str(way), str(call)]
        measured = subprocess.run(row, capture_output=True, text=True, check=True).stdout.strip()
        print(f"| {how} | {what} | {measured} |", flush=True)


def _measure(way: str, what: str) -> str:
    call, heard, stop = _call(what), list[float](), Stop()

    def handle(number: int, frame: FrameType | None) -> None:
        del number, frame
        heard.append(time.monotonic())

    signal.signal(signal.SIGTERM, handle)
    sender = subprocess.Popen(
        [sys.executable, "-c", _KILL, str(os.getpid())], stdout=subprocess.PIPE, text=True
    )
    started = time.monotonic()
    if way == _WAYS[0]:
        call()
    elif way == _WAYS[1]:
        (thread := threading.Thread(target=call)).start()
        thread.join()
    else:
        waiter = threading.Thread(target=_note, args=(stop, heard))
        waiter.start()
        with graceful_shutdown(stop):
            call()
            waiter.join()
    took = time.monotonic() - started
    sent = float(sender.communicate()[0])
    return f"{took:.1f} s | {heard[0] - sent:.3f} s"


def _note(stop: Stop, heard: list[float]) -> None:
    stop.event.wait()
    heard.append(time.monotonic())


def _call(what: str) -> Callable[[], object]:
    """Return a call of several seconds; see _CALLS."""
    if what == "lock held":
        return partial(sum, itertools.repeat(1, 500_000_000))
    if what == "lock released":
        return partial(hashlib.pbkdf2_hmac, "sha256", b"a", b"b", 9_000_000)
    import torch

    torch.set_num_threads(1)
    return partial(torch.linalg.svd, torch.rand(1800, 1800))


if __name__ == "__main__":
    main()
