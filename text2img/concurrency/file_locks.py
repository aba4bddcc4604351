"""File locks between processes; the system releases the lock of a dead process, however it died.

They are for folders on one machine: network file systems implement such locks differently.
docs/decisions/file-locks.md explains why filelock is not used.
"""

from __future__ import annotations

import errno
import fcntl
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

SHARED: Final = fcntl.LOCK_SH
EXCLUSIVE: Final = fcntl.LOCK_EX
_POLL_INTERVAL: Final = 0.2  # seconds between attempts to get a lock that another process holds


def is_full(exc: BaseException) -> bool:
    """Return True if the error means that a disk is full, or a quota exhausted."""
    return isinstance(exc, OSError) and exc.errno in {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def locked(file: Path, wait: Callable[[float], None]) -> Iterator[None]:
    """Hold the exclusive lock of a file, within this process and among others; the file is created and kept.

    ``wait(seconds)`` sleeps between the attempts, and may raise.
    """
    with file.open("ab") as opened:
        while not try_lock(opened, EXCLUSIVE):
            wait(_POLL_INTERVAL)
        yield


def lock(file: IO[Any] | int, kind: int) -> None:
    """Lock the open file, SHARED or EXCLUSIVE, until it is closed; wait as long as others hold it."""
    fcntl.flock(file, kind)


def try_lock(file: IO[Any] | int, kind: int) -> bool:
    """Lock the open file without waiting; return False if another process holds it.

    Raises OSError where the file system supports no locks.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
