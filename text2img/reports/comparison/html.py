"""A comparison as one HTML page that needs nothing but itself: small pictures are in it, originals are
linked.

Whatever comes from a prompt, a run or a picture is escaped; the page holds no script, and forbids any.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Final

from text2img.errors import ObjectUnreadable
from text2img.reports.comparison import comparison_stats, differences
from text2img.reports.comparison.similarity import in_parallel
from text2img.reports.comparison.table import least_alike, name_of, one_line, pace, shown
from text2img.reports.gallery import link_of
from text2img.reports.gallery.page import thumbnail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from text2img.reports.comparison import Comparison, ComparisonStats, Pair, Picture

SHOWN: Final = 500
"""Pairs that the page shows, some 16 kB each, those that are least alike first; JSON has all."""
_TITLE: Final = "Two runs compared"
_TEXT = 2000  # characters of a prompt
_STYLE: Final = """
:root { color-scheme: light dark;
  --ink: #1a202c; --faint: #5a6577; --line: #d5dbe5; --paper: #fff; --card: #f6f8fb }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --faint: #a3adbd; --line: #3a4250; --paper: #14171c; --card: #1d2229 }
}
body { margin: 2rem auto; max-width: 75rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper) }
table { border-collapse: collapse; margin: 1rem 0 }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.2rem .3rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere }
td:first-child { overflow-wrap: normal }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 34rem), 1fr)); gap: 1rem }
article { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: 1rem;
  overflow-wrap: anywhere }
article p { margin: 0 0 .6rem }
article div { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem }
figure { margin: 0 }
img { width: 100%; height: auto; display: block }
.none { border: 1px dashed var(--faint); padding: 2rem 1rem; color: var(--faint) }
figcaption, small { color: var(--faint); font-size: .85rem; margin-top: .3rem }
a { color: inherit }
"""
_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True, slots=True)
class _Look:
    """How pictures are read, and the folder (absolute) that the page is for."""

    read: Callable[[str], bytes]
    folder: Path


def page(comparison: Comparison, read: Callable[[str], bytes], folder: Path) -> Iterator[str]:
    """The page, piece by piece, for that folder, which must be absolute: links to files start there.

    ``read`` gives the bytes that a URL means, or raises Unreadable; it is asked by several threads at once.
    """
    look = _Look(read, folder)
    yield _head()
    yield from _summary(comparison)
    ordered = least_alike(comparison.pairs)[:SHOWN]
    if len(comparison.pairs) > SHOWN:
        yield f"<p>The {SHOWN:,} pairs of {len(comparison.pairs):,} that are least alike:</p>"
    yield '<div class="pairs">\n'
    yield from in_parallel(lambda pair: _pair(pair, look), ordered)
    yield "</div>\n</body>\n</html>\n"


def _head() -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_TITLE}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_TITLE}</h1>\n"
    )


def _summary(comparison: Comparison) -> Iterator[str]:
    found, (a, b) = comparison_stats(comparison), comparison.alone
    yield "<table>\n" + _row("th", "", "A", "B")
    sides = (comparison.a, comparison.b)
    yield _row("td", "run", *(side.name for side in sides))
    yield _row("td", "pictures", *(f"{len(side.pictures):,}" for side in sides))
    yield _row("td", "without a partner", f"{a:,}", f"{b:,}")
    yield _row("td", "speed", *map(pace, sides))
    for each in differences(*sides, comparison.pairs):
        pairs = f" ({each.pairs:,} pairs)" if each.pairs else ""
        yield _row("td", one_line(each.name, 40) + pairs, shown(each.a), shown(each.b))
    if found.score_a and found.score_b:
        yield _row("td", "mean score", f"{found.score_a.mean:.3f}", f"{found.score_b.mean:.3f}")
    yield "</table>\n" + _sentences(found)


def _sentences(found: ComparisonStats) -> str:
    said = [f"{found.by_id:,} pairs by their ids, {found.by_text:,} by text and seed."]
    if found.score_a:
        said.append(
            f"B scores better in {found.better:,} of {found.score_a.count:,}, worse in {found.worse:,}."
        )
    said.append(f"SSIM (1 is equal): {found.ssim or 'of no pair'}.")
    if found.clip:
        said.append(f"CLIP similarity: {found.clip}.")
    if found.not_compared:
        said.append(f"{found.not_compared:,} pairs have no SSIM.")
    return f"<p>{' '.join(said)}</p>\n"


def _row(kind: str, *cells: str) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>\n"


def _pair(pair: Pair, look: _Look) -> str:
    like = pair.similarity
    numbers = [
        f"{name} {value:.3f}"
        for name, value in (("SSIM", like.ssim), ("CLIP", like.clip))
        if value is not None
    ]
    said = " · ".join([name_of(pair.a), *numbers, *([like.note] if like.note else [])])
    texts = dict.fromkeys(one_line(each.text, _TEXT) for each in (pair.a, pair.b))
    return (
        f"<article><p>{'</p><p>'.join(map(escape, texts))}</p>"
        f"<div>{_figure('A', pair.a, look)}{_figure('B', pair.b, look)}</div>"
        f"<small>{escape(one_line(said, 500))}</small></article>\n"
    )


def _figure(letter: str, image: Picture, look: _Look) -> str:
    score = "no score" if image.score is None else f"score {image.score:.3f}"
    seed = "" if image.seed is None else f" · seed {image.seed}"
    try:
        small = thumbnail(look.read(image.url)).url
        shown_here = f'<img src="{small}" loading="lazy" alt="{escape(one_line(image.text, 200))}">'
    except ObjectUnreadable as exc:
        shown_here = f'<p class="none">{escape(one_line(str(exc), 300))}</p>'
    if link := link_of(image.url, look.folder):
        shown_here = f'<a href="{escape(link)}" rel="noreferrer">{shown_here}</a>'
    return f"<figure>{shown_here}<figcaption>{letter}: {score}{seed}</figcaption></figure>"
