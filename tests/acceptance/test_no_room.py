"""Full disks and folders that may not be written: one clear line, the right status, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.acceptance import product
from tests.acceptance.product import sleeping

DATABASE = ("--database", "sqlite:///prompts.db")
JOB = (*DATABASE, "--output", "pictures", "--model-id", str(product.MODEL))


@contextmanager
def _disk(folder, size):
    """A disk of that size at the folder; yields how to make it read-only."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=False)  # noqa: S607
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,ro", folder], check=True)  # noqa: S607
    finally:
        subprocess.run(["umount", folder], check=True)  # noqa: S607


@pytest.fixture
def folder(tmp_path):
    """A folder with a pending prompt."""
    product.add(tmp_path, product.SCENE)
    return tmp_path


def _line(finished, status=1):
    """The one line of a command that could not go on."""
    assert finished.returncode == status, finished.stderr
    assert "Traceback" not in finished.stderr
    (line,) = [line for line in product.errors(finished) if '"severity": "ERROR"' in line]
    return json.loads(line)["message"]


def _waits(folder):
    assert product.counts(folder) == {"pending": 1}


needs_mount = pytest.mark.skipif(os.getuid() != 0 or not shutil.which("mount"), reason="only root may mount")


@needs_mount
def test_a_full_disk_under_the_pictures(folder):
    """No room for a picture: one line that says so, status 1, the prompt waits, and no file is left."""
    with _disk(folder / "pictures", "4k"):
        large = ("--width", "1024", "--height", "1024")  # so that the file takes more than 4 kB
        message = _line(sleeping.run(*JOB, *large, folder=folder))
        assert "No space left on device" in message
        assert os.listdir(folder / "pictures") == []  # noqa: PTH208 - dotfiles too
    _waits(folder)


@needs_mount
def test_a_read_only_disk_under_the_pictures(folder):
    """A folder that cannot be written is found before the model is loaded: one line, and the prompt waits."""
    with _disk(folder / "pictures", "1m") as seal:
        seal()
        assert "pictures" in _line(sleeping.run(*JOB, folder=folder))
    _waits(folder)


@needs_mount
def test_a_full_disk_under_the_database(folder):
    """A SQLite file that cannot grow: one line that says so, and the file is sound afterwards."""
    (folder / "many.txt").write_text("\n".join(f"a boat {n} {'x' * 200}" for n in range(3_000)))
    with _disk(folder / "small", "300k"):
        arguments = ("--database", "sqlite:///small/prompts.db")
        message = _line(product.run("enqueue", *arguments, "many.txt", folder=folder))
        assert "the disk is full" in message
        database = sqlite3.connect(folder / "small" / "prompts.db")
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("SELECT count(*) FROM datasets").fetchone() == (0,)
        database.close()


@needs_mount
def test_a_read_only_disk_under_the_database(folder):
    """A SQLite file that may not be written is one line with its name."""
    with _disk(folder / "small", "1m") as seal:
        shutil.copy(folder / "prompts.db", folder / "small")
        seal()
        arguments = ("--database", "sqlite:///small/prompts.db", *JOB[2:])
        message = _line(sleeping.run(*arguments, folder=folder))
        assert "small/prompts.db" in message
        assert "permissions" in message


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_the_log(folder):
    """A log file that cannot grow is told of once; the run goes on, and its pictures are there."""
    finished = sleeping.run(*JOB, "--log-file", "/dev/full", folder=folder)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("completed 1")
    assert "Traceback" not in finished.stderr
    assert sum("/dev/full" in line for line in product.errors(finished)) == 1


def test_a_log_file_that_cannot_be_made(folder):
    """A log file whose folder cannot be made is wrong usage: one line, status 2, nothing claimed."""
    (folder / "file").touch()
    finished = sleeping.run(*JOB, "--log-file", "file/run.log", folder=folder)
    assert (finished.returncode, len(product.errors(finished))) == (2, 1)
    assert "file/run.log" in finished.stderr
    _waits(folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_the_output(folder):
    """Standard output that takes nothing is one line and status 1, also for a command's last words."""
    with Path("/dev/full").open("w") as full:
        finished = subprocess.run(
            product.command("status", *DATABASE), cwd=folder, env=product.environment(folder),
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=product.HANG, check=False,
        )  # fmt: skip
    assert finished.returncode == 1
    assert len(product.errors(finished)) == 1
    assert "standard output" in finished.stderr


def _without_powers(folder, *flags):
    """The job as a user whom permissions bind, as they bind everybody but root."""
    powers = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.getuid() == 0 else []
    return subprocess.run(
        [*powers, *sleeping.command(*JOB, *flags)], cwd=folder, env=product.environment(folder),
        capture_output=True, text=True, timeout=product.HANG, check=False,
    )  # fmt: skip


needs_setpriv = pytest.mark.skipif(
    os.getuid() == 0 and not shutil.which("setpriv"), reason="root cannot lay down its powers here"
)


@needs_setpriv
@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_no_permission_for_the_pictures(folder, mode):
    """Whoever may not write to the folder, or enter it, is told so in one line, and nothing is claimed."""
    (folder / "pictures").mkdir(mode=mode)
    message = _line(_without_powers(folder))
    assert "pictures" in message
    assert "permissions" in message
    _waits(folder)


@needs_setpriv
@pytest.mark.parametrize("mode", [0o444, 0o000])
def test_no_permission_for_the_database(folder, mode):
    """A SQLite file that may only be read, or not even that, is one line with its name."""
    (folder / "prompts.db").chmod(mode)
    message = _line(_without_powers(folder))
    (folder / "prompts.db").chmod(0o644)
    assert "prompts.db" in message
    assert "permissions" in message
    _waits(folder)


@needs_setpriv
def test_no_permission_for_the_log(folder):
    """A log file that may not be written is wrong usage: one line with its name, and nothing is claimed."""
    (folder / "run.log").touch(0o444)
    finished = _without_powers(folder, "--log-file", "run.log")
    assert (finished.returncode, len(product.errors(finished))) == (2, 1), finished.stderr
    assert "run.log" in finished.stderr
    _waits(folder)
