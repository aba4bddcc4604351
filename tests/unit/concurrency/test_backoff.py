"""How long to wait before asking again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from text2img.concurrency.timeouts import exponential_backoff, parse_retry_after


def test_waits_grow_to_their_end():
    """Twice as long each time, up to the longest, less at most a quarter; any number of tries will do."""
    for tries, longest in ((1, 1), (2, 2), (5, 16), (6, 20), (10_000, 20)):
        assert 0.75 * longest <= exponential_backoff(tries, 20) <= longest


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, 0), ("", 0), ("7", 7), (" 7 ", 7), ("99999", 3600), ("-3", 0), ("soon", 0), ("9" * 30, 0)],
)
def test_what_is_asked_for_in_seconds(header, seconds):
    """A number of seconds counts up to the longest; what cannot be read asks for nothing."""
    assert parse_retry_after(header, 3600) == seconds


def test_what_is_asked_for_by_a_date():
    """A date means until then; one that has passed asks for nothing."""
    now = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)
    for seconds, wait in ((30, 30), (-30, 0), (7200, 3600)):
        date = format_datetime(now + timedelta(seconds=seconds), usegmt=True)
        assert parse_retry_after(date, 3600, clock=lambda: now) == wait
    assert parse_retry_after(format_datetime(datetime.now(UTC) + timedelta(days=1)), 3600) == 3600
