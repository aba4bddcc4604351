"""How long to wait before asking again somebody who could not answer. Knows no HTTP but its Retry-After."""

from __future__ import annotations

import email.utils
import re
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def growing(tries: int, longest: float) -> float:
    """Seconds after so many tries (from 1): 1, 2, 4 … ``longest``, less up to a quarter.

    What is taken off at random keeps workers from marching in step.
    """
    return min(longest, 2.0 ** min(max(tries, 1) - 1, 10)) * secrets.SystemRandom().uniform(0.75, 1)


def _now() -> datetime:
    return datetime.now(UTC)


def asked(retry_after: str | None, longest: float, *, clock: Callable[[], datetime] = _now) -> float:
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
