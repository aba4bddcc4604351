"""Files that processes lock against one another; the system frees what a dead process held, however it died.

For folders of one machine: network file systems keep such locks in ways of their own.
"""

from __future__ import annotations

import fcntl
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SHARED: Final = fcntl.LOCK_SH
ALONE: Final = fcntl.LOCK_EX
_LOOK: Final = 0.2  # seconds between looks at a lock that another process has


@contextmanager
def locked(file: Path, wait: Callable[[float], None]) -> Iterator[None]:
    """Nobody else, in this process or another, is in such a block of that file, which is made and stays.

    ``wait(seconds)`` sleeps between the looks, and may raise.
    """
    with file.open("ab") as opened:
        while not try_lock(opened, ALONE):
            wait(_LOOK)
        yield


def lock(file: IO[Any] | int, kind: int) -> None:
    """Lock the open file, SHARED or ALONE, until it is closed, however long others have it."""
    fcntl.flock(file, kind)


def try_lock(file: IO[Any] | int, kind: int) -> bool:
    """The same without waiting: False where others have it. Raises OSError where nothing can be locked."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
