"""The pages as a whole: the README's size, links that lead somewhere, and indexes that name every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
DECISIONS = sorted(path for path in (DOCS / "decisions").glob("*.md") if path.name != "README.md")
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "CHANGELOG.md")),
        *DOCS.rglob("*.md"),
        ROOT / "training" / "README.md",
    ]
)

_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1[^\n]*$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6} +(.+?)(?: +#+)?$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number = 0
        while (anchor := f"{slug}-{number}" if number else slug) in found:
            number += 1
        found.add(anchor)
    return found


def links(text: str) -> list[str]:
    """Return the targets of a page's links and images, without those in code and those to other hosts."""
    prose = _CODE.sub("", _FENCE.sub("", text))
    targets = [inline or reference for inline, reference in _LINK.findall(prose)]
    return [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:", target)]


def broken(page: Path) -> list[str]:
    """Return the links of a page that name no file, or no heading of the file."""
    wrong = []
    for target in links(page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            wrong.append(target)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_each_link_leads_somewhere(page: Path) -> None:
    """Each relative link of a page names a file that exists, and an anchor that a heading of it has."""
    assert broken(page) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    """The check above can fail: it sees files and headings that are missing, and passes over code."""
    (tmp_path / "there.md").write_text(
        "# What it `does`, and how\n\n## Twice\n\n## Twice\n\n```\n# code\n```\n"
    )
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#what-it-does-and-how) [c](there.md#twice-1) [d](https://host/x#y)\n"
        "`[e](code.md)` ![f](no.png) [g](there.md#code) [h](#nothing) [i](gone.md#x)\n\n"
        "```\n[j](fenced.md)\n```\n\n[k]: gone-too.md\n"
    )
    assert broken(page) == ["no.png", "there.md#code", "#nothing", "gone.md#x", "gone-too.md"]


def test_the_readme_is_short() -> None:
    """A reader sees the whole README in a few screens; details are pages of docs/."""
    text = (ROOT / "README.md").read_bytes()
    assert len(text.splitlines()) <= 200
    assert len(text) <= 16_000


def _unlisted(index: Path, pages: list[Path]) -> list[str]:
    listed = links(index.read_text(encoding="utf-8"))
    names = [page.relative_to(index.parent).as_posix() for page in pages]
    return [name for name in names if listed.count(name) != 1]


def test_the_index_of_the_pages_is_complete() -> None:
    """docs/README.md links to each page once, and to the index of the decisions."""
    pages = sorted(path for path in DOCS.glob("*.md") if path.name != "README.md")
    assert _unlisted(DOCS / "README.md", [*pages, DOCS / "decisions" / "README.md"]) == []


def test_the_index_of_the_decisions_is_complete() -> None:
    """docs/decisions/README.md links to each decision once."""
    assert DECISIONS
    assert _unlisted(DOCS / "decisions" / "README.md", DECISIONS) == []


@pytest.mark.parametrize("page", DECISIONS, ids=lambda page: page.stem)
def test_a_decision_has_its_three_parts(page: Path) -> None:
    """A decision is a short page: context, decision and consequences, in this order."""
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Consequences"]
    assert 15 <= len(text.splitlines()) <= 40
