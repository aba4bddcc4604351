"""A database that is away is asked again, for as long as was asked for and no longer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from text2img.databases.patient import patient
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
    waits: list[float] = []
    database = patient(Away(4), 60, waits.append)
    assert database.pending("spring", deep=True) == ("spring", True)
    assert waits == [0.5, 1, 2, 4]


def test_patience_ends() -> None:
    """A database that stays away fails the call, with its own sentence."""
    with pytest.raises(DatabaseFailed, match="nobody answers"):
        patient(Away(1), 0, lambda _: None).pending("spring")


def test_patience_ends_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one call has given up, the next does not wait anew; should the database be back, it is asked."""
    waits = [0.0]
    monkeypatch.setattr("text2img.databases.patient.time", SimpleNamespace(monotonic=lambda: sum(waits)))
    away = Away(100)
    database = patient(away, 60, waits.append)
    with pytest.raises(DatabaseFailed):
        database.pending("spring")
    waited = len(waits)
    with pytest.raises(DatabaseFailed):
        database.pending("spring")
    assert waited == len(waits) > 10
    away.left = 0
    assert database.pending("spring") == ("spring", False)


def test_a_stop_ends_the_waiting() -> None:
    """Whoever is asked to stop does not wait for the database."""

    def stopped(_: float) -> None:
        raise Stopped(15)

    with pytest.raises(Stopped):
        patient(Away(1), 60, stopped).pending("spring")


def test_what_is_no_call_is_the_databases_own() -> None:
    """Attributes are passed through as they are."""
    assert patient(Away(0), 60, lambda _: None).url == "away://"
