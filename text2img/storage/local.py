"""Image storage in a folder; each file appears whole or not at all.

Paths are strings here: pathlib would intern two names for each image, and Python's intern table would grow.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
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
from text2img.settings import expand_home
from text2img.storage import (
    FOREIGN_REASON,
    MAX_OBJECT_BYTES,
    Existing,
    check_name,
    classify_as_ours,
    identity,
    object_name,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from text2img.storage import Classify

_TEMPORARY_PREFIX = ".text2img-"  # the dot hides it from listings and galleries; no image's name has one
_TEMPORARY = re.compile(r"\.text2img-([0-9a-f]{24}|[0-9a-f]{16}\.html)")  # an image, a report
_ABANDONED_AGE = 3600  # seconds after which a temporary file's writer is certainly dead
_FILE_ERRORS = frozenset({errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EISDIR, errno.EFBIG})
_LINK_UNSUPPORTED = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV})

_IRREPLACEABLE = "a file of another user exists already, which this one may not replace; delete it"


class LocalStorage:
    """An ImageStorage that keeps its objects as files in one folder, created with the first file.

    ``folder`` may start with ``~``. A file gets its name only when its bytes are on disk: it is written under
    a temporary name, synced, then linked. Neither a crash nor a full disk leaves half an image.
    """

    def __init__(self, folder: str) -> None:
        if not folder.strip() or "\0" in folder:
            raise ConfigurationError("the output folder's name is empty or contains a NUL; check --output")
        # Not Path.resolve: a folder behind a symbolic link keeps the name that the user gave.
        self._folder = os.path.abspath(expand_home(folder, "--output (OUTPUT_URL)"))
        self._cleanup_lock = threading.Lock()
        self._cleaned_up = False

    def check(self) -> None:
        """Check that the folder is writable or can be created; see ImageStorage.check."""
        existing = self._folder
        while not os.path.lexists(existing):
            existing = os.path.dirname(existing)
        if not os.path.isdir(existing):
            raise StorageFailed(f"{existing} is not a folder; choose another --output")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise StorageFailed(f"the folder {existing} is not writable; check its permissions")

    def check_writable(self) -> None:
        """Store and delete a test file, and folders created for it; see ImageStorage.check_writable."""
        name = f"doctor-{secrets.token_hex(8)}.txt"
        created, folder = [], self._folder
        while not os.path.lexists(folder):
            created.append(folder)
            folder = os.path.dirname(folder)
        self._cleaned_up = True  # what other writers have left is not for a check to remove
        path = self.put(name, b"text2img doctor", "text/plain", lambda: True)
        try:
            os.unlink(path)
        except OSError as exc:
            raise self._storage_error(exc) from exc
        with contextlib.suppress(OSError):  # another writer may use it by now
            for folder in created:
                os.rmdir(folder)

    def put(
        self,
        name: str,
        data: bytes,
        content_type: str,  # noqa: ARG002 - a file has no content type
        may_replace: Callable[[], bool],
        classify: Classify = classify_as_ours,
    ) -> str:
        """Store the file, atomically by link(2), which never replaces; see ImageStorage.put.

        One race remains in a folder: another process may replace a different file between its comparison and
        its replacement here.
        """
        target = os.path.join(self._folder, check_name(name))
        self._prepare(os.path.dirname(target))
        try:
            if self._existing(target, data, classify) is not Existing.SAME:
                with self._temporary(data) as temporary:
                    self._publish(temporary, target, data, may_replace, classify)
        except OSError as exc:
            if exc.errno in _FILE_ERRORS:
                raise self._rejected(name, exc.strerror) from exc
            raise self._storage_error(exc) from exc
        return target

    def read(self, url: str) -> bytes:
        """Return the file's content; only regular files are read, no links. See ImageStorage.read."""
        target = os.path.join(self._folder, object_name({os.path.join(self._folder, ""): identity}, url))
        try:
            with open(target, "rb", opener=_open_no_follow) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise ObjectUnreadable(f"{target} is not a file")
                data = file.read(MAX_OBJECT_BYTES + 1)
        except OSError as exc:
            reason = "it is a symbolic link" if exc.errno == errno.ELOOP else exc.strerror
            raise ObjectUnreadable(f"{target} cannot be read: {reason}") from exc
        if len(data) > MAX_OBJECT_BYTES:
            raise ObjectUnreadable(f"{target} is larger than {MAX_OBJECT_BYTES >> 20} MiB")
        return data

    def _prepare(self, folder: str) -> None:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as exc:
            raise self._storage_error(exc) from exc
        with self._cleanup_lock:
            if not self._cleaned_up:
                self._cleaned_up = True
                self._remove_abandoned()

    def _remove_abandoned(self) -> None:
        """Remove the temporary files of killed writers. Best effort: a file that stays does no harm."""
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                if _TEMPORARY.fullmatch(entry.name):
                    with contextlib.suppress(OSError):
                        if entry.stat(follow_symlinks=False).st_mtime < time.time() - _ABANDONED_AGE:
                            os.unlink(entry)

    @contextlib.contextmanager
    def _temporary(self, data: bytes) -> Iterator[str]:
        """Yield the path of a new, synced file with that content, and remove it afterwards."""
        path = os.path.join(self._folder, _TEMPORARY_PREFIX + secrets.token_hex(12))
        # 0o666 less the umask: every user of the folder may read images (mkstemp's files are for one user).
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

    def _publish(
        self, temporary: str, target: str, data: bytes, may_replace: Callable[[], bool], classify: Classify
    ) -> None:
        """Give the temporary file its name; replace a file of different content only if allowed."""
        try:
            os.link(temporary, target)
        except OSError as exc:
            # Some file systems (exFAT, network shares) have no hard links: the claim's holder may rename.
            if exc.errno != errno.EEXIST and exc.errno not in _LINK_UNSUPPORTED:
                raise
            existing = self._existing(target, data, classify)
            if existing is Existing.SAME:
                return
            if not may_replace():
                raise ClaimLost(f"{os.path.basename(target)} exists already and the claim is lost") from None
            if existing is Existing.FOREIGN:
                raise self._rejected(os.path.basename(target), FOREIGN_REASON) from None
            try:
                os.replace(temporary, target)
            except PermissionError as forbidden:  # another user's file, in a folder that all may write to
                if existing is None:
                    raise
                raise self._rejected(os.path.basename(target), _IRREPLACEABLE) from forbidden
        self._sync_folder(os.path.dirname(target))

    def _existing(self, target: str, data: bytes, classify: Classify) -> Existing | None:
        """Return what the existing file is, None if there is none; raise PromptFailed if it is not a file.

        A file that may not be read counts as OURS.
        """
        try:
            status = os.stat(target)
        except FileNotFoundError:
            return classify(b"") if os.path.islink(target) else None  # a dead link has no content
        if not stat.S_ISREG(status.st_mode):
            raise self._rejected(os.path.basename(target), "this name exists but is not a file")
        try:
            with open(target, "rb") as file:
                content = file.read(max(len(data), MAX_OBJECT_BYTES) + 1)
        except FileNotFoundError:
            return None
        except PermissionError:
            return Existing.OURS
        if content == data:
            return Existing.SAME
        return Existing.FOREIGN if len(content) > MAX_OBJECT_BYTES else classify(content)

    @staticmethod
    def _sync_folder(folder: str) -> None:
        """Make the new name survive a power cut. Some file systems cannot sync a folder, nor need to."""
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _storage_error(self, exc: OSError) -> StorageFailed:
        reason = exc.strerror or type(exc).__name__
        return StorageFailed(f"cannot write to the folder {self._folder}: {reason}; check --output")

    def _rejected(self, name: str, reason: str | None) -> PromptFailed:
        message = f"{name} cannot be written to {self._folder}: {reason}"
        return PromptFailed(ErrorCode.STORAGE_REJECTED, message)


def _open_no_follow(path: str, flags: int) -> int:
    """Open a file but not a link. O_NONBLOCK: opening a pipe without a writer would block."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
