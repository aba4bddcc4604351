"""Time limits: call a function with a timeout, back off between attempts, read a Retry-After header."""

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

    from tenacity import RetryCallState


_Result = TypeVar("_Result")


_POLL_INTERVAL = 0.2  # seconds between checks of the cancel event


def run_with_timeout(
    timeout: float, action: Callable[[], _Result], cancel: threading.Event | None = None
) -> _Result:
    """Return what ``action`` returns, or raise what it raises, within ``timeout`` seconds.

    Raises TimeoutError after ``timeout``, or soon after ``cancel`` is set.

    Socket timeouts bound neither a name lookup nor an answer that trickles in byte by byte. The action
    runs in a daemon thread, which is abandoned when it overruns: it must be harmless if it ends later. So
    that it ends and frees its socket, its connections need limits of their own (``http_limits``).
    """
    results: list[_Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as exc:  # noqa: BLE001 - raised again in the waiting thread
            errors.append(exc)

    thread = threading.Thread(target=run, name="with-timeout", daemon=True)
    thread.start()
    _join(thread, timeout, cancel)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"timed out after {timeout:g} s")
    return results[0]


def _join(thread: threading.Thread, timeout: float, cancel: threading.Event | None) -> None:
    if cancel is None:
        thread.join(timeout)
        return
    until = time.monotonic() + timeout
    while thread.is_alive() and not cancel.is_set() and (left := until - time.monotonic()) > 0:
        thread.join(min(_POLL_INTERVAL, left))


def timeout_in(exc: BaseException) -> TimeoutError | None:
    """Return the timeout that caused the error, a socket's or a limit's; None for other errors."""
    cause: BaseException | None = exc
    while cause is not None and not isinstance(cause, TimeoutError):
        cause = cause.__cause__ or cause.__context__
    return cause


def exponential_backoff(attempts: int, max_delay: float) -> float:
    """Return the seconds to wait after the given number of attempts (from 1): 1, 2, 4 … ``max_delay``.

    Up to a quarter is taken off at random, so that workers do not retry in step.
    """
    return min(max_delay, 2.0 ** min(max(attempts, 1) - 1, 10)) * secrets.SystemRandom().uniform(0.75, 1)


def stop_after_deadline(deadline: float, clock: Callable[[], float]) -> Callable[[RetryCallState], bool]:
    """Return a stop for tenacity: end the retries if the next attempt would start after ``deadline``.

    ``deadline`` is a time of ``clock``. tenacity's own stops read ``time.monotonic``.
    """
    return lambda state: clock() + state.upcoming_sleep > deadline


def _now() -> datetime:
    return datetime.now(UTC)


def parse_retry_after(header: str | None, max_delay: float, *, clock: Callable[[], datetime] = _now) -> float:
    """Return the seconds of a Retry-After header, at most ``max_delay``; 0 if it is missing or invalid.

    The header holds a number of seconds or a date (RFC 9110, 10.2.3); dates are compared with ``clock``.
    """
    value = (header or "").strip()
    if re.fullmatch(r"[0-9]{1,18}", value):
        return min(float(value), max_delay)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return min(max((date - clock()).total_seconds(), 0.0), max_delay)
