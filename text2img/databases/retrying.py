"""A database that is away for a while: whatever was asked of it is asked again until it is back.

The contract allows it: every call may be repeated. A claim whose answer was lost is not known here; its
lease runs out, and the prompts are claimed again.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, cast

from text2img.errors import DatabaseFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from text2img.databases import Database

log = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 5.0  # seconds


def with_retries(
    database: Database,
    patience: float,
    wait: Callable[[float], None],
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Database:
    """The same database, each call of which fails only once it has failed for ``patience`` seconds.

    Once one has, the database counts as gone: whatever fails from then on fails at once, in any thread.

    ``wait(seconds)`` sleeps between tries; what it raises (a stop) ends the call. ``clock`` counts
    the seconds.
    """
    return cast("Database", RetryingDatabase(database, patience, wait, clock))


class RetryingDatabase:
    """Stands before a database; every method is the database's own, asked again while it fails."""

    def __init__(
        self,
        database: Database,
        patience: float,
        wait: Callable[[float], None],
        clock: Callable[[], float],
    ) -> None:
        self._database, self._patience, self._wait, self._clock = database, patience, wait, clock
        self._gone = threading.Event()

    def __getattr__(self, name: str) -> Any:
        asked = getattr(self._database, name)
        return functools.partial(self._ask, asked) if callable(asked) else asked

    def _ask(self, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        until = self._clock() + self._patience
        pause = _FIRST_WAIT
        while True:
            try:
                return method(*arguments, **named)
            except DatabaseFailed as exc:
                if self._gone.is_set() or self._clock() + pause > until:
                    self._gone.set()
                    raise
                log.warning("%s; asking again in %g s", exc, pause)
            self._wait(pause)
            pause = min(pause * 2, _LONGEST_WAIT)
