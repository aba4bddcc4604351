"""A SQLite file that may only be read: on a read-only volume, in a folder of another user."""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from tests.contract.database_suite import ALL
from text2img.databases import Collections, open_database
from text2img.databases.sqlite import check_exists

NOBODY = 65_534


@pytest.fixture
def folder():
    """A folder that any user may enter."""
    made = Path(tempfile.mkdtemp())
    made.chmod(0o755)
    yield made
    made.chmod(0o755)
    shutil.rmtree(made)


def _as_another_user(look):
    """Return whether ``look`` returned true in a process without the rights of this one."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.getuid() == 0:
                os.setuid(NOBODY)
            status = 0 if look() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _sees(file, number):
    with closing(open_database(f"sqlite:///{file}", Collections(), create=False)) as database:
        counts = database.runs.counts(ALL)
        return (counts.pending, len(list(database.results.completed(ALL)))) == (number, 0)


@pytest.mark.parametrize("mode", [0o555, 0o777], ids=["folder read-only", "folder writable"])
@pytest.mark.parametrize("killed", [False, True], ids=["closed", "with a WAL"])
def test_a_file_that_may_only_be_read_is_read(folder, mode, killed):
    """With all that was committed, also where a killed writer has left it in the WAL; nothing is changed."""
    file, used = folder / "prompts.db", folder / "used.db"
    opened = closing(open_database(f"sqlite:///{used}", Collections()))
    with opened, closing(sqlite3.connect(used)) as writer:
        writer.execute("INSERT INTO datasets (_id, text) VALUES (1, 'a boat')")
        writer.commit()
        for ending in ("", "-wal") if killed else ():
            shutil.copyfile(f"{used}{ending}", f"{file}{ending}")
    if not killed:
        shutil.copyfile(used, file)
    used.unlink()
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(mode)
    assert _as_another_user(lambda: _sees(file, 1))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} | content == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_a_file_that_is_there_is_no_error(folder):
    """Whatever it holds."""
    (folder / "p.db").touch()
    check_exists(f"sqlite:///{folder}/p.db")
