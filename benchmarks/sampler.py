"""Where a process's processor time goes, over all its threads: a sampling profiler of one page.

Python's own profilers see one thread each and make what they watch slower. Every few milliseconds each
thread's processor clock is read (Linux), and what it has gained is put down to the functions on its stack,
also where they are inside C code that lets other threads run. A thread can be looked at only where it lets
go of the interpreter, so that short functions are blurred into their neighbours.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import CodeType, FrameType

_INTERVAL = 0.002  # seconds


@dataclass(frozen=True, slots=True)
class Share:
    """Seconds of processor time spent in a function itself, and in it with all that it called."""

    function: str
    own: float
    whole: float


class Sampler:
    """Samples within its ``with`` block; ``shares`` says afterwards where the time went."""

    def __init__(self) -> None:
        self._own: defaultdict[CodeType, float] = defaultdict(float)
        self._whole: defaultdict[CodeType, float] = defaultdict(float)
        self._clocks: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()

    def shares(self) -> list[Share]:
        """All functions that were seen, the most time of their own first."""
        found = [Share(_name(code), self._own[code], whole) for code, whole in self._whole.items()]
        return sorted(found, key=lambda share: share.own, reverse=True)

    def _sample(self) -> None:
        while not self._over.wait(_INTERVAL):
            frames = sys._current_frames()  # noqa: SLF001 - the documented way to see other threads' stacks
            for thread in threading.enumerate():
                if thread is self._thread or thread.ident not in frames or thread.native_id is None:
                    continue
                self._attribute(frames[thread.ident], self._gained(thread.native_id))

    def _gained(self, thread: int) -> float:
        """Processor seconds that the thread used since it was last looked at."""
        try:
            now = time.clock_gettime((~thread << 3) | 6)  # its CPU clock, see clock_getcpuclockid(3)
        except OSError:
            return 0.0  # it has just ended
        before = self._clocks.get(thread, now)
        self._clocks[thread] = now
        return max(0.0, now - before)

    def _attribute(self, frame: FrameType | None, gained: float) -> None:
        if not gained or frame is None:
            return
        self._own[frame.f_code] += gained
        seen = set()
        while frame is not None:
            seen.add(frame.f_code)
            frame = frame.f_back
        for code in seen:
            self._whole[code] += gained


def _name(code: CodeType) -> str:
    return f"{'/'.join(PurePath(code.co_filename).parts[-3:])}:{code.co_firstlineno} {code.co_qualname}"
