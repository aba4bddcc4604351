"""Calls to an unavailable database are retried, up to the timeout and no longer."""

from __future__ import annotations

import inspect
from unittest.mock import create_autospec

import pytest

from tests.clock import Clock
from text2img.databases import Connection, Database, Outbox, Queue, Results, RunStore, Selection
from text2img.databases.retrying import with_retries
from text2img.errors import DatabaseFailed, Stopped

SPRING = Selection("spring")
PARTS = {"connection": Connection, "queue": Queue, "outbox": Outbox, "runs": RunStore, "results": Results}
METHODS = [
    (part, name)
    for part, protocol in PARTS.items()
    for name, _ in inspect.getmembers(protocol, inspect.isfunction)
    if not name.startswith("_")
]
NOT_RETRIED = {"enqueue", "requeue_changed", "completed", "failures"}


def retrying(part: object, *args: object, **kwargs: object) -> Database:
    """Return a database of that one part, with its calls retried."""
    return with_retries(Database(*[part] * len(PARTS)), *args, **kwargs)


class Unavailable:
    """A part of a database whose first ``times`` calls fail."""

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
    database = retrying(Unavailable(6), 60, clock.advance, clock=clock)
    assert database.outbox.notifications(webhooks=True) == (7, True)
    assert clock.pauses == [0.5, 1, 2, 4, 5, 5]


def test_the_timeout_ends_a_call() -> None:
    """A database that stays unavailable fails the call, with its own message."""
    with pytest.raises(DatabaseFailed, match="no response"):
        retrying(Unavailable(1), 0, lambda _: None).queue.pending(SPRING)


def test_the_timeout_ends_once_for_all() -> None:
    """After one call has timed out, the next does not wait; it succeeds if the database is back."""
    clock, unavailable = Clock(), Unavailable(100)
    database = retrying(unavailable, 60, clock.advance, clock=clock)
    with pytest.raises(DatabaseFailed):
        database.queue.pending(SPRING)
    waited = [*clock.pauses]
    assert 55 < sum(waited) <= 60
    with pytest.raises(DatabaseFailed):
        database.queue.pending(SPRING)
    assert clock.pauses == waited
    unavailable.left = 0
    assert database.queue.pending(SPRING) == 7


def test_a_stop_ends_the_waiting() -> None:
    """A run that is stopped does not wait for the database."""

    def stopped(_: float) -> None:
        raise Stopped(15)

    with pytest.raises(Stopped):
        retrying(Unavailable(1), 60, stopped).queue.pending(SPRING)


@pytest.mark.parametrize(("part", "name"), METHODS)
def test_every_method_of_the_protocols_is_passed_on(part: str, name: str) -> None:
    """Each method passes its arguments on, returns the result, and is retried unless it must not be."""
    clock, below = Clock(), create_autospec(PARTS[part], instance=True)
    method = getattr(getattr(retrying(below, 60, clock.advance, clock=clock), part), name)
    signature = inspect.signature(getattr(PARTS[part], name))
    parameters = list(signature.parameters.values())[1:]
    given = {each.name: object() for each in parameters}
    args = [given[each.name] for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    kwargs = {each.name: given[each.name] for each in parameters if each.kind is each.KEYWORD_ONLY}
    called, result = getattr(below, name), object()
    called.side_effect = [DatabaseFailed("no response"), result]
    if name in NOT_RETRIED:
        with pytest.raises(DatabaseFailed):
            method(*args, **kwargs)
    assert method(*args, **kwargs) is (None if signature.return_annotation == "None" else result)
    assert clock.pauses == ([] if name in NOT_RETRIED else [0.5])
    called.assert_called_with(*args, **kwargs)
