"""A comparison as lines for a terminal, as JSON, and as an HTML page."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from text2img.errors import ObjectUnreadable
from text2img.reports import render
from text2img.reports.comparison import comparison_stats, differences
from text2img.reports.comparison.similarity import in_parallel
from text2img.reports.gallery import link_of
from text2img.reports.gallery.page import thumbnail

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from text2img.reports.comparison import Comparison, ComparisonStats, Difference, Pair, RecordedImage, Side


SHOWN: Final = 40
"""Pairs that are listed, the least similar first; JSON has all."""
_TEXT_WIDTH, _MAX_VALUES = 44, 3


def table(comparison: Comparison) -> list[str]:
    """Return the table's lines: sides, differences, scores and similarity, then the pairs."""
    stats = comparison_stats(comparison)
    return [
        *(_side_line("A", comparison.a), _side_line("B", comparison.b)),
        *_difference_lines(differences(comparison.a, comparison.b, comparison.pairs)),
        _matches(comparison, stats),
        *_stats_lines(stats),
        *_pair_lines(comparison.pairs),
    ]


def _matches(comparison: Comparison, stats: ComparisonStats) -> str:
    only_a, only_b = comparison.alone
    return (
        f"pairs    {len(comparison.pairs):,} (by id {stats.by_id:,}, by text and seed {stats.by_text:,});"
        f" without a partner: {only_a:,} of A, {only_b:,} of B"
    )


def one_line(text: str, max_length: int) -> str:
    """Return a text on one line, without control characters, and cut with an ellipsis."""
    line = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text.split()))
    return line if len(line) <= max_length else f"{line[: max_length - 1]}…"


def shown(values: Sequence[object]) -> str:
    """Return at most three values of a parameter as text."""
    texts = [value if isinstance(value, str) else json.dumps(value, default=str) for value in values]
    more = ", …" if len(texts) > _MAX_VALUES else ""
    return ", ".join(one_line(text, 60) or '""' for text in texts[:_MAX_VALUES]) + more or "–"


def least_similar_first(pairs: Sequence[Pair]) -> list[Pair]:
    """Return the pairs by their SSIM, the lowest first; those without one come last."""
    return sorted(pairs, key=lambda pair: 2.0 if pair.similarity.ssim is None else pair.similarity.ssim)


def name_of(image: RecordedImage) -> str:
    """Return the prompt's id, followed by the image's number unless it is the first."""
    return f"{image.prompt}{f' ({image.number + 1})' if image.number else ''}"


def speed_and_stages(side: Side) -> str:
    """Return the side's speed, and its seconds by stage, the longest first."""
    stages = sorted(side.seconds.items(), key=lambda stage: -stage[1])
    spent = ", ".join(
        f"{one_line(stage, 20)} {seconds:,.1f} s" for stage, seconds in stages if seconds >= 0.05
    )
    speed = f"{side.images_per_second:.2f} images/s" if side.images_per_second else "speed unknown"
    return f"{speed}; {spent}" if spent else speed


def _side_line(letter: str, side: Side) -> str:
    speed = speed_and_stages(side)
    return f"{letter}        {one_line(side.name, 100)}: {len(side.images):,} images, {speed}"


def _difference_lines(found: Sequence[Difference]) -> Iterator[str]:
    if not found:
        yield "differs  nothing that is recorded"
    for difference in found:
        pairs = f" ({difference.pairs:,} pairs)" if difference.pairs else ""
        values = f"A {shown(difference.a)}; B {shown(difference.b)}"
        yield f"differs  {one_line(difference.name, 40)}: {values}{pairs}"


def _stats_lines(stats: ComparisonStats) -> Iterator[str]:
    if stats.score_a and stats.score_b:
        count = stats.score_a.count
        equal = count - stats.better - stats.worse
        yield (
            f"score    A {stats.score_a.mean:.3f}, B {stats.score_b.mean:.3f}, means of {count:,};"
            f" B is better in {stats.better:,}, worse in {stats.worse:,}, equal in {equal:,}"
        )
    else:
        yield "score    no pair in which both have one"
    yield f"SSIM     {stats.ssim or 'of no pair'}" + (
        f"; {stats.not_compared:,} not compared" if stats.not_compared else ""
    )
    if stats.clip:
        yield f"CLIP     {stats.clip}"


def _pair_lines(pairs: Sequence[Pair]) -> Iterator[str]:
    if not pairs:
        return
    ordered = least_similar_first(pairs)[:SHOWN]
    ids = [one_line(name_of(pair.a), 24) for pair in ordered]
    width = max(map(len, (*ids, "prompt")))
    has_clip = any(pair.similarity.clip is not None for pair in ordered)
    yield ""
    yield f"{'prompt':<{width}}  {'text':<{_TEXT_WIDTH}}  score A  score B     SSIM" + (
        "     CLIP" if has_clip else ""
    )
    for name, pair in zip(ids, ordered, strict=True):
        similarity = pair.similarity
        numbers = [
            pair.a.score,
            pair.b.score,
            similarity.ssim,
            *([similarity.clip] if has_clip else []),
        ]
        cells = "  ".join("      –" if number is None else f"{number:7.3f}" for number in numbers)
        note = f"  {one_line(similarity.note, 120)}" if similarity.note else ""
        text = one_line(pair.a.text, _TEXT_WIDTH)
        yield f"{name:<{width}}  {text:<{_TEXT_WIDTH}}  {cells}{note}"
    if len(pairs) > SHOWN:
        yield f"… and {len(pairs) - SHOWN:,} more similar pairs; --json has all"


def document(comparison: Comparison) -> str:
    """Return the comparison as one JSON object in ASCII, with a newline at its end."""
    only_a, only_b = comparison.alone
    fields = {
        "a": {**_side_document(comparison.a), "alone": only_a},
        "b": {**_side_document(comparison.b), "alone": only_b},
        "differences": [
            asdict(difference) for difference in differences(comparison.a, comparison.b, comparison.pairs)
        ],
        "figures": asdict(comparison_stats(comparison)),
        "pairs": [_pair_document(pair) for pair in comparison.pairs],
    }
    return json.dumps(fields, indent=1, default=str) + "\n"


def _side_document(side: Side) -> dict[str, object]:
    return {
        "name": side.name,
        "runs": [run.id for run in side.runs],
        "pictures": len(side.images),
        "images_per_second": side.images_per_second or None,
        "seconds": side.seconds,
    }


def _pair_document(pair: Pair) -> dict[str, object]:
    similarity = pair.similarity
    return {
        "prompt_id": str(pair.a.prompt),
        "text": pair.a.text,
        "matched_by": "id" if pair.by_id else "text and seed",
        "a": _image_document(pair.a),
        "b": _image_document(pair.b),
        "ssim": similarity.ssim,
        "clip": similarity.clip,
        "note": similarity.note,
    }


def _image_document(image: RecordedImage) -> dict[str, object]:
    return {
        "prompt_id": str(image.prompt),
        "number": image.number,
        "text": image.text,
        "image_url": image.url,
        "seed": image.seed,
        "score": image.score,
        "used": image.used,
    }


MAX_PAIRS_ON_PAGE: Final = 500
"""Pairs that the page shows, about 16 kB each, the least similar first; JSON has all."""
_MAX_TEXT = 2000  # characters of a prompt


@dataclass(frozen=True, slots=True)
class _ImageView:
    """What the page shows of an image; ``thumbnail`` is a ``data:`` URL, None for a ``reason``."""

    caption: str
    text: str
    link: str | None
    thumbnail: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class _PairView:
    """What the page shows of a pair; ``texts`` has two if the images' texts differ, else one."""

    texts: tuple[str, ...]
    images: tuple[_ImageView, _ImageView]
    caption: str


def page(comparison: Comparison, read: Callable[[str], bytes], folder: Path) -> Iterator[str]:
    """Yield the page piece by piece; links to files are relative to ``folder``, which must be absolute.

    ``read`` returns the bytes at a URL, or raises ObjectUnreadable; several threads call it at once.
    """
    pairs, stats = comparison.pairs, comparison_stats(comparison)
    omitted = f"The {MAX_PAIRS_ON_PAGE:,} least similar of {len(pairs):,} pairs:"
    return render(
        "text2img.reports.comparison",
        rows=_rows(comparison, stats),
        statistics=_stats_text(stats),
        omitted=omitted if len(pairs) > MAX_PAIRS_ON_PAGE else None,
        pairs=in_parallel(
            lambda pair: _pair_view(pair, read, folder), least_similar_first(pairs)[:MAX_PAIRS_ON_PAGE]
        ),
    )


def _rows(comparison: Comparison, stats: ComparisonStats) -> Iterator[tuple[str, str, str]]:
    """Yield the rows of the page's table: a name, A's value and B's."""
    a, b = comparison.a, comparison.b
    only_a, only_b = comparison.alone
    yield "run", a.name, b.name
    yield "images", f"{len(a.images):,}", f"{len(b.images):,}"
    yield "without a partner", f"{only_a:,}", f"{only_b:,}"
    yield "speed", speed_and_stages(a), speed_and_stages(b)
    for difference in differences(a, b, comparison.pairs):
        pairs = f" ({difference.pairs:,} pairs)" if difference.pairs else ""
        yield one_line(difference.name, 40) + pairs, shown(difference.a), shown(difference.b)
    if stats.score_a and stats.score_b:
        yield "mean score", f"{stats.score_a.mean:.3f}", f"{stats.score_b.mean:.3f}"


def _stats_text(stats: ComparisonStats) -> str:
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
    return " ".join(lines)


def _pair_view(pair: Pair, read: Callable[[str], bytes], folder: Path) -> _PairView:
    similarity = pair.similarity
    numbers = [
        f"{name} {value:.3f}"
        for name, value in (("SSIM", similarity.ssim), ("CLIP", similarity.clip))
        if value is not None
    ]
    caption = " · ".join([name_of(pair.a), *numbers, *([similarity.note] if similarity.note else [])])
    return _PairView(
        texts=tuple(dict.fromkeys(one_line(image.text, _MAX_TEXT) for image in (pair.a, pair.b))),
        images=(_image_view("A", pair.a, read, folder), _image_view("B", pair.b, read, folder)),
        caption=one_line(caption, 500),
    )


def _image_view(letter: str, image: RecordedImage, read: Callable[[str], bytes], folder: Path) -> _ImageView:
    score = "no score" if image.score is None else f"score {image.score:.3f}"
    seed = "" if image.seed is None else f" · seed {image.seed}"
    url, reason = None, ""
    try:
        url = thumbnail(read(image.place)).url
    except ObjectUnreadable as exc:
        reason = one_line(str(exc), 300)
    return _ImageView(
        caption=f"{letter}: {score}{seed}",
        text=one_line(image.text, 200),
        link=link_of(image.place, folder),
        thumbnail=url,
        reason=reason,
    )
