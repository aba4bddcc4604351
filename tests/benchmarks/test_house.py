"""The figures of how readable the package is: what each of them counts."""

from __future__ import annotations

import pytest

from benchmarks import house


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of four modules: a small one with one importer, one with two, and a large one."""
    root = tmp_path / "text2img"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "small.py").write_text("class Proxy:\n    def __getattr__(self, name):\n        return name\n")
    (root / "shared.py").write_text("# nobody is told\n")
    (root / "large.py").write_text(
        "from text2img.small import Proxy\nfrom text2img import shared\n" + "x = 1\n" * house.SMALL
    )
    (root / "other.py").write_text("def late():\n    import text2img.shared\n" + "y = 1\n" * house.SMALL)
    monkeypatch.setattr(house, "ROOT", tmp_path)
    monkeypatch.setattr(house, "PACKAGE", root)


def test_a_small_module_with_one_importer_is_counted(package):
    """Imports are followed in either form and inside functions; one with two importers is not counted."""
    known = house.modules()
    assert set(known) == {"text2img", *(f"text2img.{name}" for name in ("small", "shared", "large", "other"))}
    assert house.small_modules(known) == ["text2img.small (3 lines, for text2img.large)"]


def test_old_words_and_attribute_hooks_are_named_where_they_are(package):
    """Each use of an old word has its file and line, and each class with __getattr__ its name."""
    assert house.old_words() == ["text2img/shared.py:1: nobody", "text2img/shared.py:1: told"]
    assert house.attribute_hooks(house.modules()) == ["text2img.small.Proxy"]


def test_the_entries_are_those_that_git_knows():
    """What stands at the top of the package is counted once, however many files it holds."""
    entries = house.entries()
    assert {"__init__.py", "cli", "errors.py"} <= set(entries)
    assert len(entries) == len(set(entries))
