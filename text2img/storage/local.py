"""Pictures in a folder, each written whole or not at all. Knows files and bytes, no images.

Paths are texts here: pathlib would intern two names for each picture, and Python's table of them would grow.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import threading
import time
from typing import TYPE_CHECKING

from text2img.errors import (
    ClaimLost,
    ConfigurationError,
    ErrorCode,
    ObjectUnreadable,
    PromptFailed,
    StorageFailed,
)
from text2img.storage import LARGEST, check_name, identity, name_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TEMPORARY = ".text2img-"  # the dot keeps it out of listings and galleries; no picture's name starts with one
_ABANDONED = 3600  # seconds after which a temporary file's writer is surely dead
_THIS_FILE = frozenset({errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EISDIR, errno.EFBIG})
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})


class LocalStorage:
    """An ImageStorage that keeps its objects as files of one folder, which is made when the first one comes.

    ``folder`` may start with ``~``. A file appears under its name only when its bytes are on the disk
    (written aside, synced, then linked), so neither a crash nor a full disk leaves half a picture.
    """

    def __init__(self, folder: str) -> None:
        if not folder.strip() or "\0" in folder:
            raise ConfigurationError("the output folder's name is empty or holds a NUL; check --output")
        # Not Path.resolve: a folder behind a symbolic link keeps the name that its owner gave it.
        self._folder = os.path.abspath(os.path.expanduser(folder))
        self._sweep = threading.Lock()
        self._swept = False

    def check(self) -> None:
        """As ImageStorage.check: the folder can be written to, or could be made."""
        place = self._folder
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        if not os.path.isdir(place):
            raise StorageFailed(f"{place} is no folder; choose another --output")
        if not os.access(place, os.W_OK | os.X_OK):
            raise StorageFailed(f"the folder {place} cannot be written to; check its permissions")

    def check_writable(self) -> None:
        """As ImageStorage.try_write. The folder stays, should it have been made for this."""
        name = f"doctor-{secrets.token_hex(8)}.txt"
        path = self.put(name, b"text2img doctor", "text/plain", lambda: True)
        try:
            os.unlink(path)
        except OSError as exc:
            raise self._failed(exc) from exc

    def put(self, name: str, data: bytes, content_type: str, may_replace: Callable[[], bool]) -> str:  # noqa: ARG002 - a file has no content type
        """As ImageStorage.put. Atomic by link(2), which never replaces; a different file that is looked at
        and replaced by somebody else in the same instant is the one gap a folder leaves.
        """
        target = os.path.join(self._folder, check_name(name))
        self._prepare(os.path.dirname(target))
        try:
            if not self._same(target, data):
                with self._temporary(data) as temporary:
                    self._publish(temporary, target, data, may_replace)
        except OSError as exc:
            if exc.errno in _THIS_FILE:
                raise self._rejected(name, exc.strerror) from exc
            raise self._failed(exc) from exc
        return target

    def read(self, url: str) -> bytes:
        """As ImageStorage.read. Neither a symbolic link nor anything else that is no file is read."""
        target = os.path.join(self._folder, name_in({os.path.join(self._folder, ""): identity}, url))
        try:
            with open(target, "rb", opener=_no_link) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise ObjectUnreadable(f"{target} is no file")
                data = file.read(LARGEST + 1)
        except OSError as exc:
            reason = "it is a symbolic link" if exc.errno == errno.ELOOP else exc.strerror
            raise ObjectUnreadable(f"{target} cannot be read: {reason}") from exc
        if len(data) > LARGEST:
            raise ObjectUnreadable(f"{target} is larger than {LARGEST >> 20} MiB")
        return data

    def _prepare(self, folder: str) -> None:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as exc:
            raise self._failed(exc) from exc
        with self._sweep:
            if not self._swept:
                self._swept = True
                self._remove_abandoned()

    def _remove_abandoned(self) -> None:
        """Remove what killed writers left behind. Best effort: what stays does no harm."""
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.startswith(_TEMPORARY):
                    with contextlib.suppress(OSError):
                        if entry.stat(follow_symlinks=False).st_mtime < time.time() - _ABANDONED:
                            os.unlink(entry)

    @contextlib.contextmanager
    def _temporary(self, data: bytes) -> Iterator[str]:
        """The path of a synced file of its own with that content, gone afterwards."""
        path = os.path.join(self._folder, _TEMPORARY + secrets.token_hex(12))
        # 0o666 less the umask: pictures are for whoever may read the folder (mkstemp's are for one user).
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _publish(self, temporary: str, target: str, data: bytes, may_replace: Callable[[], bool]) -> None:
        """Give the temporary file its name: create-only first, over another content only if allowed."""
        try:
            os.link(temporary, target)
        except FileExistsError:
            if self._same(target, data):
                return
            self._replace(temporary, target, may_replace)
        except OSError as exc:
            if exc.errno not in _NO_HARD_LINKS:
                raise
            # Some file systems (exFAT, network shares) know no links: whoever holds the claim may rename.
            self._replace(temporary, target, may_replace)
        self._sync(os.path.dirname(target))

    def _replace(self, temporary: str, target: str, may_replace: Callable[[], bool]) -> None:
        if not may_replace():
            raise ClaimLost(f"{os.path.basename(target)} is there already and the claim is lost")
        os.replace(temporary, target)

    def _same(self, target: str, data: bytes) -> bool:
        """Whether the file is there with that content; PromptFailed where something else has its name."""
        try:
            found = os.stat(target)
        except FileNotFoundError:
            return False
        if not stat.S_ISREG(found.st_mode):
            raise self._rejected(os.path.basename(target), "something that is no file has this name")
        if found.st_size != len(data):
            return False
        try:
            with open(target, "rb") as file:
                return file.read(len(data) + 1) == data
        except (FileNotFoundError, PermissionError):
            return False

    @staticmethod
    def _sync(folder: str) -> None:
        """Let the new name outlive a power cut. Some file systems cannot sync a folder; they need not."""
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _failed(self, exc: OSError) -> StorageFailed:
        reason = exc.strerror or type(exc).__name__
        return StorageFailed(f"cannot write to the folder {self._folder}: {reason}; check --output")

    def _rejected(self, name: str, reason: str | None) -> PromptFailed:
        message = f"{name} cannot be written to {self._folder}: {reason}"
        return PromptFailed(ErrorCode.STORAGE_REJECTED, message)


def _no_link(path: str, flags: int) -> int:
    """Open a file but no link; a pipe that nobody writes to would hold up whoever asks without O_NONBLOCK."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
