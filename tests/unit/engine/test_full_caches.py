"""Caches on a disk that is full: what is not in use makes room, and what is in use stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.unit.engine.test_loras import library, lora, refusal, weights
from text2img.concurrency.file_locks import EXCLUSIVE, lock
from text2img.engine.models import Snapshots
from text2img.errors import ErrorCode, ModelFailed

pytestmark = pytest.mark.skipif(
    os.getuid() != 0 or not shutil.which("mount"), reason="only root may mount a small disk"
)
PAGE = 4096
ONE = 20 * PAGE  # bytes of a file, on a disk that holds two of them and a few pages more


@pytest.fixture
def disk(tmp_path):
    """A folder on a small disk."""
    with _mounted(tmp_path / "disk", 2 * ONE + 8 * PAGE) as folder:
        yield folder


@contextmanager
def _mounted(folder, size):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("this machine does not allow mounting a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # noqa: S607 - caches keep files open


@pytest.fixture
def web(httpserver):
    """A server with LoRAs of the same size."""
    for name in "abcdef":
        content = weights(ONE - 1024, name.encode())
        httpserver.expect_request(f"/{name}").respond_with_data(content, headers={"ETag": name})
    return httpserver.url_for("/")


def _kept(disk):
    return {file.read_bytes()[-1:].decode() for file in (disk / "cache").glob("*.safetensors")}


def test_runs_one_after_the_other_make_room(disk, web):
    """Each run finds room for its LoRA, however full the disk is, and the latest ones stay."""
    for name in "abcdef":
        file = library(disk, web).file(lora(web + name))
        assert Path(file).read_bytes()[-1:] == name.encode()
    assert _kept(disk) == {"e", "f"}
    assert not list((disk / "cache").glob("part-*"))
    assert len(list((disk / "cache").glob("*.json"))) == 2


def test_one_run_makes_room_among_its_own(disk, web):
    """A server that needs more LoRAs in its time than the disk holds gives up those that it uses no more."""
    shelf = library(disk, web)
    held = shelf.file(lora(web + "a"))
    for name in "bcdef":
        assert Path(shelf.file(lora(web + name))).read_bytes()[-1:] == name.encode()
    assert Path(held).read_bytes()[-1:] == b"a"
    assert _kept(disk) == {"a", "f"}


def test_what_is_in_use_is_not_evicted(disk, web):
    """While everything is in use, another LoRA has to wait, and its prompt is tried later."""
    first, second = library(disk, web), library(disk, web, retry_timeout=0)
    held = [first.file(lora(web + "a")), second.file(lora(web + "b"))]
    assert "No space left on device" in refusal(second, web + "c", ErrorCode.GENERATION_FAILED)
    assert _kept(disk) == {"a", "b"}
    del held[1]
    assert second.file(lora(web + "c"))
    assert _kept(disk) == {"a", "c"}


def test_what_killed_runs_have_left_goes_first(disk, web):
    """Unfinished downloads of runs that are gone make room; those of others that are under way do not."""
    cache = disk / "cache"
    cache.mkdir()
    (cache / "part-deadbeef").write_bytes(bytes(ONE))
    with (cache / "part-aliveone").open("wb") as alive:
        alive.write(bytes(ONE // 2))
        lock(alive, EXCLUSIVE)
        library(disk, web).file(lora(web + "a"))
        assert [part.name for part in cache.glob("part-*")] == ["part-aliveone"]


def _snapshot(folder, model, revision, *, age=0.0, size=ONE):
    """Add a snapshot, as a run that has used it so long ago and is over."""

    def fetch(part):
        (part / "weights").write_bytes(bytes(size))

    snapshots = Snapshots(folder / (model * 40), time.sleep)
    added = snapshots.add(revision * 40, {"weights": size}, fetch)
    os.utime(added, (time.time() - age,) * 2)
    return snapshots, added


def _end(snapshots):
    """Drop the locks of a run, as its process's end does."""
    for descriptor in snapshots._descriptors:
        os.close(descriptor)


def test_models_that_are_not_in_use_make_room_for_another(disk):
    """The least recently used snapshot goes, of whichever model, but none that a run uses."""
    old, old_folder = _snapshot(disk, "a", "1", age=300)
    new, new_folder = _snapshot(disk, "b", "1", age=100)
    _end(new)  # the other is in use
    (disk / "keep").mkdir()
    _, third = _snapshot(disk, "c", "1")
    assert (old_folder.exists(), new_folder.exists(), third.exists()) == (True, False, True)
    _end(old)
    _, fourth = _snapshot(disk, "d", "1")
    assert (old_folder.exists(), third.exists(), fourth.exists()) == (False, True, True)
    with pytest.raises(ModelFailed, match="free disk space or set another folder"):
        _snapshot(disk, "e", "1")
    assert (disk / "keep").is_dir()


def test_a_disk_that_fills_up_during_a_download_makes_room(disk):
    """What was free at first and is not any more is made free, and the download is begun again."""
    other, other_folder = _snapshot(disk, "a", "1")
    _end(other)
    filling = disk / "filling"
    fetched = []

    def fetch(part):
        fetched.append(part)
        if len(fetched) == 1:
            filling.write_bytes(bytes(ONE - 4 * PAGE))
        (part / "weights").write_bytes(bytes(ONE))

    snapshot = Snapshots(disk / ("b" * 40), time.sleep).add("2" * 40, {"weights": ONE}, fetch)
    assert (snapshot / "weights").stat().st_size == ONE
    assert (len(fetched), other_folder.exists()) == (2, False)


def test_a_models_unfinished_download_makes_room(disk):
    """What a killed process has left of another model's download goes first."""
    used, folder = _snapshot(disk, "a", "1")
    _end(used)
    part = folder.parent / "part-deadbeef"
    part.mkdir()
    (part / "weights").write_bytes(bytes(ONE))
    _snapshot(disk, "b", "1")
    assert (part.exists(), folder.exists()) == (False, True)
