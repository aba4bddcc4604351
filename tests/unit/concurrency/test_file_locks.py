"""Locks of files and folders: shared and exclusive, between open files and between processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from text2img.concurrency.file_locks import EXCLUSIVE, SHARED, locked, try_lock

ROOT = Path(__file__).parents[3]
HOLDER = """
import sys
from pathlib import Path
from text2img.concurrency.file_locks import locked
with locked(Path(sys.argv[1]), lambda seconds: sys.exit("it is locked")):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["folder", "read-only file"])
def descriptors(request, tmp_path):
    """Three independent descriptors of one folder, or of one file that may only be read."""
    path = tmp_path / "it"
    if request.param == "folder":
        path.mkdir()
    else:
        path.touch(mode=0o444)
    opened = [os.open(path, os.O_RDONLY) for _ in range(3)]
    yield opened
    for descriptor in opened:
        os.close(descriptor)


def test_users_share_a_lock_that_refuses_its_remover(descriptors):
    """Two shared locks are held at once; an exclusive one is refused until both are released."""
    remover, *users = descriptors
    assert all(try_lock(user, SHARED) for user in users)
    for _ in users:
        assert not try_lock(remover, EXCLUSIVE)
        os.close(descriptors.pop())
    assert try_lock(remover, EXCLUSIVE)


def test_what_is_being_removed_cannot_be_used(descriptors):
    """An exclusive lock refuses a shared one as well as another exclusive one."""
    remover, user, other = descriptors
    assert try_lock(remover, EXCLUSIVE)
    assert not try_lock(user, SHARED)
    assert not try_lock(other, EXCLUSIVE)


def test_a_killed_process_leaves_no_lock(tmp_path):
    """A process waits while another holds the lock, gets it once the other is killed, and keeps the file."""
    file, waited = tmp_path / "lock", []
    command = [sys.executable, "-c", HOLDER, str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout.readline() == b"locked\n"

            def kill(seconds):
                waited.append(seconds)
                holder.kill()
                holder.wait()

            with locked(file, kill):
                assert len(waited) == 1
        finally:
            holder.kill()
    assert file.exists()


def test_what_ends_the_wait_ends_the_attempt(tmp_path):
    """An exception of ``wait`` ends the attempt, and the lock can be taken when its holder releases it."""

    def stop(seconds):
        raise KeyboardInterrupt

    file = tmp_path / "lock"
    with locked(file, stop), pytest.raises(KeyboardInterrupt), locked(file, stop):
        pytest.fail("two hold the lock")
    with locked(file, stop):
        pass
