"""The folder that keeps what compiling was seen to cost and bring."""

from __future__ import annotations

import json

import pytest

from tests.engine.conftest import open_engine
from text2img.engine import EngineOptions
from text2img.engine.compile_policy import CompileCache, Estimate
from text2img.engine.diffusers import DiffusersEngine
from text2img.errors import ConfigurationError

MEASURED = Estimate(gain=0.25, cost=90.0)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The variable that opening a cache sets is restored after each test."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")


def test_kept_for_later_runs(tmp_path):
    """What one run measured another recalls; each key has its own; the newest counts."""
    folder = str(tmp_path / "volume" / "cache")
    cache = CompileCache(folder)
    cache.check()
    cache.open()
    cache.put("one", Estimate(gain=-0.1, cost=1))
    cache.put("other", MEASURED)
    cache.put("one", MEASURED)
    later = CompileCache(folder)
    assert [later.get(key) for key in ("one", "other", "none")] == [MEASURED, MEASURED, None]


def test_without_a_folder(tmp_path, monkeypatch):
    """Without a folder nothing is kept, and nothing is asked of torch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    cache = CompileCache(None)
    cache.check()
    cache.open()
    cache.put("one", MEASURED)
    assert cache.get("one") is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"one": 3}', '{"one": {"gain": 0.2}}', '{"one": {"gain": NaN, "cost": 1}}', "\xff"],
)
def test_broken_file(tmp_path, content):
    """A file that cannot be read is as if nothing had been measured, and is written anew."""
    (tmp_path / "text2img-measured.json").write_text(content, encoding="latin-1")
    cache = CompileCache(str(tmp_path))
    assert cache.get("one") is None
    cache.put("one", MEASURED)
    assert json.loads((tmp_path / "text2img-measured.json").read_text())["one"] == {"gain": 0.25, "cost": 90}


def test_no_folder_can_be_made(tiny, tmp_path):
    """A cache that cannot be written to is found on inspection, before anything is claimed."""
    (tmp_path / "file").write_text("")
    options = EngineOptions(
        model=str(tiny("sd1")), device="cpu", compile_cache=str(tmp_path / "file" / "cache")
    )
    with pytest.raises(ConfigurationError, match="--compile-cache"):
        DiffusersEngine(options).inspect()


def test_disk_full_later(tmp_path, caplog):
    """A folder that is gone by then costs a line in the log, not the run."""
    cache = CompileCache(str(tmp_path / "cache"))
    cache.open()
    (tmp_path / "cache").rmdir()
    cache.put("one", MEASURED)
    assert "could not be kept" in caplog.text


def test_loading_compiles_nothing(tiny, tmp_path):
    """Opening an engine does not even make the folder: what is not compiled leaves nothing behind."""
    open_engine(tiny("sd1"), compile_cache=str(tmp_path / "cache"))
    assert list(tmp_path.iterdir()) == []
