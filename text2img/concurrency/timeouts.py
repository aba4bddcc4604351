"""Call what may hang, and wait for it so long and no longer. Knows nothing of what is called."""

from __future__ import annotations

import email.utils
import re
import secrets
import threading
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable


_Result = TypeVar("_Result")


_LOOK = 0.2  # seconds between looks at an event


def run_with_timeout(
    seconds: float, action: Callable[[], _Result], unless: threading.Event | None = None
) -> _Result:
    """What ``action`` returns or raises; TimeoutError where it has done neither after ``seconds``, or soon
    after ``unless`` is set.

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
    _join(thread, seconds, unless)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no end after {seconds:g} s")
    return results[0]


def _join(thread: threading.Thread, seconds: float, unless: threading.Event | None) -> None:
    if unless is None:
        thread.join(seconds)
        return
    until = time.monotonic() + seconds
    while thread.is_alive() and not unless.is_set() and (left := until - time.monotonic()) > 0:
        thread.join(min(_LOOK, left))


def exponential_backoff(tries: int, longest: float) -> float:
    """Seconds after so many tries (from 1): 1, 2, 4 … ``longest``, less up to a quarter.

    What is taken off at random keeps workers from marching in step.
    """
    return min(longest, 2.0 ** min(max(tries, 1) - 1, 10)) * secrets.SystemRandom().uniform(0.75, 1)


def _now() -> datetime:
    return datetime.now(UTC)


def parse_retry_after(
    retry_after: str | None, longest: float, *, clock: Callable[[], datetime] = _now
) -> float:
    """The seconds that a Retry-After asks for, by number or by date (RFC 9110, 10.2.3), at most ``longest``.

    0 where there is none, or none that can be read. ``clock`` says what a date is compared with.
    """
    value = (retry_after or "").strip()
    if re.fullmatch(r"[0-9]{1,18}", value):
        return min(float(value), longest)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return min(max((date - clock()).total_seconds(), 0.0), longest)
