"""A database that is away is asked again, for as long as was asked for and no longer."""

from __future__ import annotations

import pytest

from tests.clock import Clock
from text2img.databases.retrying import with_retries
from text2img.errors import DatabaseFailed, Stopped


class Away:
    """A database that does not answer the first ``times`` times."""

    url = "away://"

    def __init__(self, times: int) -> None:
        self.left = times

    def pending(self, selection: str, *, deep: bool = False) -> tuple[str, bool]:
        if self.left:
            self.left -= 1
            raise DatabaseFailed("nobody answers")
        return selection, deep


def test_a_call_is_repeated_until_the_database_is_back() -> None:
    """The answer is that of the first call that succeeds, with waits that grow between the tries."""
    clock = Clock()
    database = with_retries(Away(6), 60, clock.advance, clock=clock)
    assert database.pending("spring", deep=True) == ("spring", True)
    assert clock.pauses == [0.5, 1, 2, 4, 5, 5]


def test_patience_ends() -> None:
    """A database that stays away fails the call, with its own sentence."""
    with pytest.raises(DatabaseFailed, match="nobody answers"):
        with_retries(Away(1), 0, lambda _: None).pending("spring")


def test_patience_ends_once_for_all() -> None:
    """After one call has given up, the next does not wait anew; should the database be back, it is asked."""
    clock, away = Clock(), Away(100)
    database = with_retries(away, 60, clock.advance, clock=clock)
    with pytest.raises(DatabaseFailed):
        database.pending("spring")
    waited = [*clock.pauses]
    assert 55 < sum(waited) <= 60
    with pytest.raises(DatabaseFailed):
        database.pending("spring")
    assert clock.pauses == waited
    away.left = 0
    assert database.pending("spring") == ("spring", False)


def test_a_stop_ends_the_waiting() -> None:
    """Whoever is asked to stop does not wait for the database."""

    def stopped(_: float) -> None:
        raise Stopped(15)

    with pytest.raises(Stopped):
        with_retries(Away(1), 60, stopped).pending("spring")


def test_what_is_no_call_is_the_databases_own() -> None:
    """Attributes are passed through as they are."""
    assert with_retries(Away(0), 60, lambda _: None).url == "away://"
