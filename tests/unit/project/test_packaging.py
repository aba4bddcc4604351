"""What pages and messages tell a user to install, and under which name this project would be installed."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import tomllib
from glob import glob
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
FORBIDDEN = {"text2img", "text2img-batch"}
"""On PyPI the old name belongs to another project; the new one is safe only once it is registered there."""

_INSTALLERS = re.compile(
    r"\b(?:pip[0-9.]*|pipx|uv|uvx|poetry|pdm|conda|mamba|easy_install)\b(?P<rest>[^\n`;&|]*)"
)
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)(?:\[[^\]]*\])?(?:[<>=!~@][^\s]*)?")


def installed(text: str) -> set[str]:
    """Return the normalised names of all packages that commands in ``text`` install."""
    joined = re.sub(r"\\\n\s*", " ", text)
    names = set()
    for command in _INSTALLERS.finditer(joined):
        words = command["rest"].split()
        if command[0].startswith("uvx") or {"install", "add", "run", "inject", "tool"} & set(words):
            found = (_REQUIREMENT.fullmatch(word.strip("'\"(),.:")) for word in words)
            names |= {re.sub(r"[-_.]+", "-", match["name"]).lower() for match in found if match}
    return names


def _messages(path: Path) -> str:
    """Return all string literals of a module, each on a line of its own, with ``?`` for what is filled in."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "?" for part in node.values)
            lines.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            lines.append(node.value)
    return "\n".join(lines)


def _tracked() -> list[Path]:
    listed = subprocess.run(
        [shutil.which("git") or "git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".sh", ""}
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.suffix in suffixes and path.is_file() and path != Path(__file__)]


def test_no_page_or_message_installs_our_distribution_by_name():
    """No page, message, script or docstring installs ``text2img`` or our own name from an index."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    found = {}
    for path in _tracked():
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.suffix == ".py":
            text += "\n" + _messages(path)
        if names := installed(text) & FORBIDDEN:
            found[path.relative_to(ROOT).as_posix()] = names
    assert not found


@pytest.mark.parametrize(
    "command",
    [
        "pip install text2img",
        "python -m pip install -U 'text2img[gemini]'",
        "pip3 install --user text2img_batch==0.2",
        "pipx install text2img-batch",
        "pipx run text2img",
        "uv pip install \\\n    'text2img-batch[ray]>=0.2'",
        "uv tool install text2img",
        "uvx text2img",
        "uv add Text2Img",
    ],
)
def test_the_search_finds_each_spelling(command):
    """The check above can fail: it sees the name in any common installer, with extras and versions."""
    assert installed(f"Run `{command}` first.") & FORBIDDEN


@pytest.mark.parametrize(
    "command", ["pip install '.[gemini]'", "pip install -e .", "pip install 'google-genai>=2'; text2img run"]
)
def test_the_search_lets_the_checkout_and_libraries_pass(command):
    """Installing from the checkout, or a library by its own name, is what the pages should say."""
    assert not installed(command) & FORBIDDEN


def test_extras_refer_to_this_distribution():
    """An extra that includes others names this project; any other name would be fetched from an index."""
    own = {re.match(r"[\w.-]+", line)[0] for line in PROJECT["optional-dependencies"]["dev"]}
    assert own == {PROJECT["name"]}
    assert PROJECT["name"] != "text2img"
    assert PROJECT["scripts"] == {"text2img": "text2img.__main__:main"}


def test_every_file_of_the_package_is_installed_with_it():
    """Every template, font and other data file matches a pattern that setuptools installs."""
    package = ROOT / "text2img"
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["text2img"]
    installed_files = {
        file
        for pattern in patterns
        for file in glob(pattern, root_dir=package, recursive=True)  # noqa: PTH207 - as setuptools does
    }
    files = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"}
    }
    assert files > {"py.typed", "reports/gallery/page/page.html"}
    assert files - installed_files == set()
