"""Calls to an unavailable database are retried, up to the timeout and no longer."""

from __future__ import annotations

import inspect
from unittest.mock import create_autospec

import pytest

from tests.clock import Clock
from text2img.databases import Database, Selection
from text2img.databases.retrying import RetryingDatabase, with_retries
from text2img.errors import DatabaseFailed, Stopped

SPRING = Selection("spring")
METHODS = sorted(
    name for name, _ in inspect.getmembers(Database, inspect.isfunction) if not name.startswith("_")
)
NOT_RETRIED = {"enqueue", "requeue_changed", "completed", "failures"}


class Unavailable:
    """A database whose first ``times`` calls fail."""

    def __init__(self, times: int) -> None:
        self.left = times

    def notifications(self, *, webhooks: bool = False) -> tuple[int, bool]:
        return self.pending(SPRING), webhooks

    def pending(self, selection: Selection) -> int:
        assert selection is SPRING
        if self.left:
            self.left -= 1
            raise DatabaseFailed("no response")
        return 7


def test_a_call_is_repeated_until_the_database_is_back() -> None:
    """The result is that of the first call that succeeds; the delays between attempts grow."""
    clock = Clock()
    database = with_retries(Unavailable(6), 60, clock.advance, clock=clock)
    assert database.notifications(webhooks=True) == (7, True)
    assert clock.pauses == [0.5, 1, 2, 4, 5, 5]


def test_the_timeout_ends_a_call() -> None:
    """A database that stays unavailable fails the call, with its own message."""
    with pytest.raises(DatabaseFailed, match="no response"):
        with_retries(Unavailable(1), 0, lambda _: None).pending(SPRING)


def test_the_timeout_ends_once_for_all() -> None:
    """After one call has timed out, the next does not wait; it succeeds if the database is back."""
    clock, unavailable = Clock(), Unavailable(100)
    database = with_retries(unavailable, 60, clock.advance, clock=clock)
    with pytest.raises(DatabaseFailed):
        database.pending(SPRING)
    waited = [*clock.pauses]
    assert 55 < sum(waited) <= 60
    with pytest.raises(DatabaseFailed):
        database.pending(SPRING)
    assert clock.pauses == waited
    unavailable.left = 0
    assert database.pending(SPRING) == 7


def test_a_stop_ends_the_waiting() -> None:
    """A run that is stopped does not wait for the database."""

    def stopped(_: float) -> None:
        raise Stopped(15)

    with pytest.raises(Stopped):
        with_retries(Unavailable(1), 60, stopped).pending(SPRING)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_the_protocol_is_passed_on(name: str) -> None:
    """Each method passes its arguments on, returns the result, and is retried unless it must not be."""
    clock, database = Clock(), create_autospec(Database, instance=True)
    signature = inspect.signature(getattr(RetryingDatabase, name))
    assert signature == inspect.signature(getattr(Database, name))
    parameters = list(signature.parameters.values())[1:]
    given = {each.name: object() for each in parameters}
    args = [given[each.name] for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    kwargs = {each.name: given[each.name] for each in parameters if each.kind is each.KEYWORD_ONLY}
    method, result = getattr(database, name), object()
    method.side_effect = [DatabaseFailed("no response"), result]
    retrying = getattr(with_retries(database, 60, clock.advance, clock=clock), name)
    if name in NOT_RETRIED:
        with pytest.raises(DatabaseFailed):
            retrying(*args, **kwargs)
    assert retrying(*args, **kwargs) is (None if signature.return_annotation == "None" else result)
    assert clock.pauses == ([] if name in NOT_RETRIED else [0.5])
    method.assert_called_with(*args, **kwargs)
