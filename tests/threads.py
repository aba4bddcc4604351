"""Says what threads are doing, for tests that something has to wait."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType


def waiting_in(function: Callable[..., object]) -> int:
    """Return how many threads wait for another one, with this function of ours among their callers."""
    frames = sys._current_frames().values()
    return sum(_is_waiting(frame) and function.__code__ in _callers(frame) for frame in frames)


def _is_waiting(frame: FrameType) -> bool:
    """Say whether it is ``Condition.wait`` that runs, by which events, queues and semaphores wait as well."""
    return frame.f_code is threading.Condition.wait.__code__


def _callers(frame: FrameType | None) -> list[object]:
    codes: list[object] = []
    while frame is not None:
        codes.append(frame.f_code)
        frame = frame.f_back
    return codes
