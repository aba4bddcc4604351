"""What only a folder can do: be a file, be full, be read-only, and keep what a killed writer left."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from text2img.errors import (
    ClaimLost,
    ConfigurationError,
    ErrorCode,
    ObjectUnreadable,
    PromptFailed,
    StorageFailed,
)
from text2img.storage import MAX_OBJECT_BYTES, open_storage
from text2img.storage.local import LocalStorage


def put(folder, name="7.png", data=b"picture", may_replace=lambda: False):
    return LocalStorage(str(folder)).put(name, data, "image/png", may_replace)


def breaking(monkeypatch, name, code):
    """Let that call of ``os`` fail in that way, as a full or strange disk does."""

    def fail(*args, **options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, name, fail)


def test_url_is_the_absolute_path(tmp_path, monkeypatch):
    """A relative folder and one that starts with ~ are reported by their full path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert put("a/../out") == str(tmp_path / "out" / "7.png")
    assert put("~/out") == str(tmp_path / "home" / "out" / "7.png")


def test_pictures_obey_the_umask(tmp_path):
    """Pictures are readable by whoever the folder is for, not by their writer alone."""
    before = os.umask(0o027)
    try:
        assert Path(put(tmp_path)).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_nothing_but_the_picture_stays(tmp_path):
    """Created, repeated, replaced or refused: no temporary file is left."""
    put(tmp_path)
    put(tmp_path)
    put(tmp_path, data=b"another", may_replace=lambda: True)
    with pytest.raises(ClaimLost):
        put(tmp_path, data=b"a third")
    assert os.listdir(tmp_path) == ["7.png"]  # noqa: PTH208 - dotfiles too


def test_abandoned_temporary_files_go(tmp_path):
    """What a killed writer left is removed once it is old; a living writer's file is not, nor are others."""
    old, new = (tmp_path / f".text2img-{digit * 24}" for digit in "0f")
    others = [tmp_path / name for name in (".other", ".text2img-notes", f".text2img-{'0' * 24}.md")]
    for path in (old, new, *others):
        path.touch()
    for path in (old, *others):
        os.utime(path, (time.time() - 7200,) * 2)
    put(tmp_path)
    kept = [*(path.name for path in (new, *others)), "7.png"]
    assert sorted(os.listdir(tmp_path)) == sorted(kept)  # noqa: PTH208


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "link"])
def test_full_or_broken_disk_fails_the_run(tmp_path, monkeypatch, call, code):
    """Whatever the disk says ends the run in one line, with nothing half-written."""
    breaking(monkeypatch, call, code)
    with pytest.raises(StorageFailed, match=os.strerror(code)) as caught:
        put(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_real_limit_of_a_files_size(tmp_path):
    """With a limit of 4 KB a file the large picture is rejected, and nothing of it stays."""
    program = (
        "import resource, sys, signal\n"
        "from text2img.errors import PromptFailed\n"
        "from text2img.storage import open_storage\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "storage = open_storage(sys.argv[1])\n"
        "storage.put('small.png', b'x' * 4096, 'image/png', lambda: False)\n"
        "try:\n"
        "    storage.put('large.png', b'x' * 4097, 'image/png', lambda: False)\n"
        "except PromptFailed as exc:\n"
        "    print(exc.code)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "storage_rejected\n"
    assert os.listdir(tmp_path) == ["small.png"]  # noqa: PTH208


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_system_without_links(tmp_path, monkeypatch, code):
    """Without link(2) a file is renamed into place by a worker that holds its claim, and by no other."""
    breaking(monkeypatch, "link", code)
    with pytest.raises(ClaimLost):
        put(tmp_path)
    put(tmp_path, may_replace=lambda: True)
    put(tmp_path)
    assert (tmp_path / "7.png").read_bytes() == b"picture"


def test_another_users_file_is_one_prompts_failure(tmp_path, monkeypatch):
    """In a folder that all may write to, a file that may not be replaced fails its prompt, not the run."""
    put(tmp_path)
    breaking(monkeypatch, "replace", errno.EPERM)
    with pytest.raises(PromptFailed, match="another user") as caught:
        put(tmp_path, data=b"new", may_replace=lambda: True)
    assert caught.value.code is ErrorCode.STORAGE_REJECTED


@pytest.mark.parametrize("name", ["x" * 256, "x" * 5000])
def test_name_too_long_is_one_prompts_failure(tmp_path, name):
    """A name that the file system does not take rejects this one object."""
    with pytest.raises(PromptFailed, match="name too long") as caught:
        put(tmp_path, name)
    assert caught.value.code is ErrorCode.STORAGE_REJECTED


def test_something_else_of_that_name(tmp_path):
    """A folder or a pipe in the picture's place rejects it, and does not hang; a dead link gives way."""
    (tmp_path / "7.png").mkdir()
    os.mkfifo(tmp_path / "8.png")
    (tmp_path / "9.png").symlink_to(tmp_path / "nowhere")
    for name in ("7.png", "8.png"):
        with pytest.raises(PromptFailed, match="not a file"):
            put(tmp_path, name, may_replace=lambda: True)
    put(tmp_path, "9.png", may_replace=lambda: True)
    assert (tmp_path / "9.png").read_bytes() == b"picture"


def test_folder_that_is_a_file(tmp_path):
    """A file where the folder or a parent of it should be is found by check, and by put."""
    file = tmp_path / "file"
    file.touch()
    dead = tmp_path / "dead"
    dead.symlink_to(tmp_path / "nowhere")
    for folder in (file, file / "below" / "it", dead):
        with pytest.raises(StorageFailed, match="not a folder"):
            LocalStorage(str(folder)).check()
        with pytest.raises(StorageFailed, match="cannot write"):
            put(folder)


def test_folder_that_vanishes_is_made_again(tmp_path):
    """Somebody removes the folder in the middle of a run: the next picture makes it again."""
    storage = LocalStorage(str(tmp_path / "out"))
    Path(storage.put("1.png", b"1", "image/png", lambda: False)).unlink()
    (tmp_path / "out").rmdir()
    assert Path(storage.put("2.png", b"2", "image/png", lambda: False)).read_bytes() == b"2"


def test_folder_without_permission(tmp_path, monkeypatch):
    """A folder that refuses writers is found by check. (Root is refused by nothing but a read-only disk.)"""
    if os.getuid() == 0:
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:
        tmp_path.chmod(0o500)
    with pytest.raises(StorageFailed, match="is not writable"):
        LocalStorage(str(tmp_path / "out")).check()


@pytest.mark.skipif(not Path("/proc/sys").is_dir(), reason="no /proc here")
def test_folder_where_nothing_can_be_made():
    """Where even root can make nothing put and try_write say so in one line."""
    for call in (
        lambda storage: storage.check_writable(),
        lambda storage: storage.put("x", b"", "t", lambda: True),
    ):
        with pytest.raises(StorageFailed, match="cannot write") as caught:
            call(LocalStorage("/proc/text2img"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["", "  ", "a\0b"])
def test_folder_that_is_none(folder):
    """An empty name and one with a NUL are configuration errors."""
    with pytest.raises(ConfigurationError, match="--output"):
        open_storage(folder)


def test_only_files_of_a_sensible_size_are_read(tmp_path):
    """A link out of the folder, a pipe that nobody fills, a folder and a vast file are refused at once."""
    folder = tmp_path / "pictures"
    url = put(folder)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    with (folder / "vast.png").open("wb") as vast:
        vast.truncate(MAX_OBJECT_BYTES + 1)
    reasons = {"link": "symbolic link", "pipe": "not a file", "folder": "directory", "vast": "larger than"}
    for name, reason in reasons.items():
        with pytest.raises(ObjectUnreadable, match=reason):
            LocalStorage(str(folder)).read(url.replace("7.png", f"{name}.png"))
    assert LocalStorage(str(folder)).read(url) == b"picture"
