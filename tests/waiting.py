"""Wait for something that happens in another process or thread.

There is no time limit here: a condition that never comes true is ended by the suite's own timeout, which is
the same for every test and large enough for a busy machine.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_Value = TypeVar("_Value")
_POLL_INTERVAL = 0.02  # seconds


def until(condition: Callable[[], _Value], ended: Callable[[], object] = lambda: False) -> _Value:
    """Return the condition's value once it is true.

    Raises AssertionError when ``ended()`` is neither None nor False first, with its value as the reason: the
    process that was to bring the condition about has exited. A process's ``poll`` will do, whose 0 is an end.
    """
    while not (value := condition()):
        if (reason := ended()) is not None and reason is not False:
            if value := condition():
                break
            raise AssertionError(f"it ended before the condition was true: {reason}")
        time.sleep(_POLL_INTERVAL)  # clock: the one place that polls
    return value
