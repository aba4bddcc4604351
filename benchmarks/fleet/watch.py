"""What a database is asked, how long that takes, and who waits for whom; does not know what it is asked for.

Watched from within its users: what the server itself does is only seen by the time that it takes.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

from text2img.databases import Collections, Database, open_database
from text2img.errors import DatabaseFailed

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterator


_A_WAIT = 0.001
"""Seconds: whoever gets a lock sooner has not waited for it."""
_asking = threading.local()
"""The method that is at work in this thread, which is where pymongo tells of its commands."""


@dataclass(slots=True)
class Log:
    """What was seen. ``took``: seconds of each call, by method; ``claimed``: the claims that were
    given, each an id and its number.

    ``failed``: calls that a patient caller had to repeat. ``waited``, ``held``: seconds for and with SQLite's
    write lock, by transaction. ``commands``: those sent to MongoDB, each with the method that sent it.
    """

    took: dict[str, list[float]] = field(default_factory=dict)
    claimed: list[tuple[str, int]] = field(default_factory=list)
    failed: int = 0
    waited: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    commands: list[tuple[str, str]] = field(default_factory=list)

    def forget(self) -> None:
        """Begin anew."""
        for seen in (self.took, self.claimed, self.waited, self.held, self.commands):
            seen.clear()
        self.failed = 0

    @property
    def lock_waits(self) -> int:
        """How many transactions waited for SQLite's lock."""
        return sum(seconds >= _A_WAIT for seconds in self.waited)

    @property
    def lost_rounds(self) -> int:
        """How often a claim in MongoDB had to look again, since others had taken what it saw."""
        looks = self.commands.count(("claim", "aggregate"))
        return max(0, looks - len(self.took["claim"]))


def together(logs: list[Log]) -> Log:
    """All that was seen, in one."""
    whole = Log()
    for log in logs:
        for name, seconds in log.took.items():
            whole.took.setdefault(name, []).extend(seconds)
        whole.claimed += log.claimed
        whole.waited += log.waited
        whole.held += log.held
        whole.commands += log.commands
        whole.failed += log.failed
    return whole


def watched(url: str, log: Log) -> Database:
    """The database of that URL, opened, whose calls are logged. Of SQLite's the lock is watched as well."""
    if url.startswith("sqlite"):
        database = _file(url, log)
        database.connection.open()
    else:
        database = open_database(url, Collections())
    parts = {part.name: _Watched(getattr(database, part.name), log) for part in fields(Database)}
    return Database(**cast("dict[str, Any]", parts))


class _Watched:
    """A part of a database whose methods are timed."""

    def __init__(self, part: object, log: Log) -> None:
        self._part, self._log = part, log

    def __getattr__(self, name: str) -> Any:
        asked = getattr(self._part, name)
        return functools.partial(self._timed, name, asked) if callable(asked) else asked

    def _timed(self, name: str, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        begun, _asking.method = time.monotonic(), name
        try:
            answer = method(*arguments, **named)
        except DatabaseFailed:
            self._log.failed += 1
            raise
        self._log.took.setdefault(name, []).append(time.monotonic() - begun)
        if name == "claim":
            self._log.claimed.extend((prompt.id.name, prompt.claim.number) for prompt in answer)
        return answer


def _file(url: str, log: Log) -> Database:
    from text2img.databases.sqlite.outbox import SqliteOutbox
    from text2img.databases.sqlite.queue import SqliteQueue
    from text2img.databases.sqlite.run_store import SqliteResults, SqliteRunStore
    from text2img.databases.sqlite.session import Session

    class Watched(Session):
        """The lock is taken as a transaction begins and let go as it ends: both happen in one place there."""

        @contextmanager
        def writing(self) -> Iterator[sqlite3.Connection]:
            asked = time.monotonic()
            with super().writing() as connection:
                got = time.monotonic()
                yield connection
            log.waited.append(got - asked)
            log.held.append(time.monotonic() - got)

    session = Watched(url, Collections())
    queue, outbox = SqliteQueue(session), SqliteOutbox(session)
    return Database(session, queue, outbox, SqliteRunStore(session), SqliteResults(session))


def count_commands(log: Log) -> None:
    """From now on the commands of all MongoDB clients that this process makes are counted there."""
    from pymongo import monitoring

    class Listener(monitoring.CommandListener):
        def started(self, event: monitoring.CommandStartedEvent) -> None:
            log.commands.append((getattr(_asking, "method", ""), event.command_name))

        def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
            pass

        def failed(self, event: monitoring.CommandFailedEvent) -> None:
            pass

    monitoring.register(Listener())


def real_mongodb() -> str | None:
    """The URI of the real MongoDB that somebody wants measured, without a path; None: the stand-in."""
    return os.environ.get("TEXT2IMG_TEST_MONGO_URI")
