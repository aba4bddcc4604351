"""Call what may hang, and wait for it so long and no longer. Knows nothing of what is called."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_Result = TypeVar("_Result")


def within(seconds: float, action: Callable[[], _Result]) -> _Result:
    """What ``action`` returns or raises; TimeoutError where it has done neither after ``seconds``.

    Socket timeouts do not bound a name lookup, nor an answer that trickles in byte by byte. The action
    runs in a daemon thread, which is left behind when it overruns: it must be harmless if it ends later.
    """
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as exc:  # noqa: BLE001 - raised again in the thread that waits
            errors.append(exc)

    thread = threading.Thread(target=run, name="within", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no end after {seconds:g} s")
    return results[0]
