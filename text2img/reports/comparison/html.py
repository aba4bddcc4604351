"""A comparison as one self-contained HTML page, with embedded thumbnails and links to the originals.

All text from prompts, runs and images is escaped; the page contains no script, and its policy forbids any.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Final

from text2img.errors import ObjectUnreadable
from text2img.reports.comparison import comparison_stats, differences
from text2img.reports.comparison.similarity import in_parallel
from text2img.reports.comparison.table import (
    least_similar_first,
    name_of,
    one_line,
    shown,
    speed_and_stages,
)
from text2img.reports.gallery import link_of
from text2img.reports.gallery.page import thumbnail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from text2img.reports.comparison import Comparison, ComparisonStats, Pair, RecordedImage

SHOWN: Final = 500
"""Pairs that the page shows, about 16 kB each, the least similar first; JSON has all."""
_TITLE: Final = "Two runs compared"
_MAX_TEXT = 2000  # characters of a prompt
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
class _RenderContext:
    """The function that reads images, and the page's folder (absolute)."""

    read: Callable[[str], bytes]
    folder: Path


def page(comparison: Comparison, read: Callable[[str], bytes], folder: Path) -> Iterator[str]:
    """Yield the page piece by piece; links to files are relative to ``folder``, which must be absolute.

    ``read`` returns the bytes at a URL, or raises ObjectUnreadable; several threads call it at once.
    """
    context = _RenderContext(read, folder)
    yield _head()
    yield from _summary(comparison)
    ordered = least_similar_first(comparison.pairs)[:SHOWN]
    if len(comparison.pairs) > SHOWN:
        yield f"<p>The {SHOWN:,} least similar of {len(comparison.pairs):,} pairs:</p>"
    yield '<div class="pairs">\n'
    yield from in_parallel(lambda pair: _pair(pair, context), ordered)
    yield "</div>\n</body>\n</html>\n"


def _head() -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_TITLE}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_TITLE}</h1>\n"
    )


def _summary(comparison: Comparison) -> Iterator[str]:
    stats, (only_a, only_b) = comparison_stats(comparison), comparison.alone
    yield "<table>\n" + _row("th", "", "A", "B")
    sides = (comparison.a, comparison.b)
    yield _row("td", "run", *(side.name for side in sides))
    yield _row("td", "images", *(f"{len(side.images):,}" for side in sides))
    yield _row("td", "without a partner", f"{only_a:,}", f"{only_b:,}")
    yield _row("td", "speed", *map(speed_and_stages, sides))
    for difference in differences(*sides, comparison.pairs):
        pairs = f" ({difference.pairs:,} pairs)" if difference.pairs else ""
        name = one_line(difference.name, 40) + pairs
        yield _row("td", name, shown(difference.a), shown(difference.b))
    if stats.score_a and stats.score_b:
        yield _row("td", "mean score", f"{stats.score_a.mean:.3f}", f"{stats.score_b.mean:.3f}")
    yield "</table>\n" + _stats_paragraph(stats)


def _stats_paragraph(stats: ComparisonStats) -> str:
    lines = [f"{stats.by_id:,} pairs by their ids, {stats.by_text:,} by text and seed."]
    if stats.score_a:
        lines.append(
            f"B scores better in {stats.better:,} of {stats.score_a.count:,}, worse in {stats.worse:,}."
        )
    lines.append(f"SSIM (1 is equal): {stats.ssim or 'of no pair'}.")
    if stats.clip:
        lines.append(f"CLIP similarity: {stats.clip}.")
    if stats.not_compared:
        lines.append(f"{stats.not_compared:,} pairs have no SSIM.")
    return f"<p>{' '.join(lines)}</p>\n"


def _row(tag: str, *cells: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"


def _pair(pair: Pair, context: _RenderContext) -> str:
    similarity = pair.similarity
    numbers = [
        f"{name} {value:.3f}"
        for name, value in (("SSIM", similarity.ssim), ("CLIP", similarity.clip))
        if value is not None
    ]
    caption = " · ".join([name_of(pair.a), *numbers, *([similarity.note] if similarity.note else [])])
    texts = dict.fromkeys(one_line(image.text, _MAX_TEXT) for image in (pair.a, pair.b))
    return (
        f"<article><p>{'</p><p>'.join(map(escape, texts))}</p>"
        f"<div>{_figure('A', pair.a, context)}{_figure('B', pair.b, context)}</div>"
        f"<small>{escape(one_line(caption, 500))}</small></article>\n"
    )


def _figure(letter: str, image: RecordedImage, context: _RenderContext) -> str:
    score = "no score" if image.score is None else f"score {image.score:.3f}"
    seed = "" if image.seed is None else f" · seed {image.seed}"
    try:
        small = thumbnail(context.read(image.url)).url
        element = f'<img src="{small}" loading="lazy" alt="{escape(one_line(image.text, 200))}">'
    except ObjectUnreadable as exc:
        element = f'<p class="none">{escape(one_line(str(exc), 300))}</p>'
    if link := link_of(image.url, context.folder):
        element = f'<a href="{escape(link)}" rel="noreferrer">{element}</a>'
    return f"<figure>{element}<figcaption>{letter}: {score}{seed}</figcaption></figure>"
