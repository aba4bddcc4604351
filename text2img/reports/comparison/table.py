"""A comparison as lines for a terminal."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from text2img.reports.comparison import comparison_stats, differences

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from text2img.reports.comparison import Comparison, ComparisonStats, Difference, Pair, Picture, Side


SHOWN: Final = 40
"""Pairs that are listed, those that are least alike first; JSON has all."""
_TEXT, _VALUES = 44, 3


def table(comparison: Comparison) -> str:
    """What differs, how fast, how good, how alike, then the pairs."""
    found = comparison_stats(comparison)
    lines = [
        *(_side("A", comparison.a), _side("B", comparison.b)),
        *_different(differences(comparison.a, comparison.b, comparison.pairs)),
        _matched(comparison, found),
        *_figures(found),
    ]
    return "\n".join([*lines, *_pairs(comparison.pairs)])


def _matched(comparison: Comparison, found: ComparisonStats) -> str:
    ours, theirs = comparison.alone
    return (
        f"pairs    {len(comparison.pairs):,} (by id {found.by_id:,}, by text and seed {found.by_text:,});"
        f" without a partner: {ours:,} of A, {theirs:,} of B"
    )


def one_line(text: str, longest: int) -> str:
    """A text as a terminal may show it, whatever it holds: no control character, and cut with an ellipsis."""
    line = "".join(char if char.isprintable() else "\ufffd" for char in " ".join(text.split()))
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def shown(values: Sequence[object]) -> str:
    """Some values of a parameter, three at the most."""
    said = [value if isinstance(value, str) else json.dumps(value, default=str) for value in values]
    more = ", …" if len(said) > _VALUES else ""
    return ", ".join(one_line(each, 60) or '""' for each in said[:_VALUES]) + more or "–"


def least_alike(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs by their SSIM, the lowest first; those without one come last."""
    return sorted(pairs, key=lambda pair: 2.0 if pair.similarity.ssim is None else pair.similarity.ssim)


def name_of(image: Picture) -> str:
    """The prompt's id, and which of its pictures it is where that is not the first."""
    return f"{image.prompt}{f' ({image.number + 1})' if image.number else ''}"


def pace(side: Side) -> str:
    """How fast it was, and where its time went."""
    stages = sorted(side.seconds.items(), key=lambda one: -one[1])
    spent = ", ".join(
        f"{one_line(stage, 20)} {seconds:,.1f} s" for stage, seconds in stages if seconds >= 0.05
    )
    speed = f"{side.images_per_second:.2f} images/s" if side.images_per_second else "speed unknown"
    return f"{speed}; {spent}" if spent else speed


def _side(letter: str, side: Side) -> str:
    return f"{letter}        {one_line(side.name, 100)}: {len(side.pictures):,} pictures, {pace(side)}"


def _different(found: Sequence[Difference]) -> Iterator[str]:
    if not found:
        yield "differs  nothing that is recorded"
    for each in found:
        pairs = f" ({each.pairs:,} pairs)" if each.pairs else ""
        yield f"differs  {one_line(each.name, 40)}: A {shown(each.a)}; B {shown(each.b)}{pairs}"


def _figures(found: ComparisonStats) -> Iterator[str]:
    if found.score_a and found.score_b:
        count = found.score_a.count
        equal = count - found.better - found.worse
        yield (
            f"score    A {found.score_a.mean:.3f}, B {found.score_b.mean:.3f}, means of {count:,};"
            f" B is better in {found.better:,}, worse in {found.worse:,}, equal in {equal:,}"
        )
    else:
        yield "score    no pair in which both have one"
    yield f"SSIM     {found.ssim or 'of no pair'}" + (
        f"; {found.not_compared:,} not compared" if found.not_compared else ""
    )
    if found.clip:
        yield f"CLIP     {found.clip}"


def _pairs(pairs: Sequence[Pair]) -> Iterator[str]:
    if not pairs:
        return
    ordered = least_alike(pairs)[:SHOWN]
    ids = [one_line(name_of(pair.a), 24) for pair in ordered]
    wide = max(map(len, (*ids, "prompt")))
    clip = any(pair.similarity.clip is not None for pair in ordered)
    yield ""
    yield f"{'prompt':<{wide}}  {'text':<{_TEXT}}  score A  score B     SSIM" + ("     CLIP" if clip else "")
    for name, pair in zip(ids, ordered, strict=True):
        like = pair.similarity
        numbers = [pair.a.score, pair.b.score, like.ssim, *([like.clip] if clip else [])]
        cells = "  ".join("      –" if number is None else f"{number:7.3f}" for number in numbers)
        note = f"  {one_line(like.note, 120)}" if like.note else ""
        yield f"{name:<{wide}}  {one_line(pair.a.text, _TEXT):<{_TEXT}}  {cells}{note}"
    if len(pairs) > SHOWN:
        yield f"… and {len(pairs) - SHOWN:,} more that are more alike; --json has all"


def document(comparison: Comparison) -> str:
    """One JSON object, in ASCII, which ends with a line's end."""
    alone = comparison.alone
    said = {
        "a": {**_side_document(comparison.a), "alone": alone[0]},
        "b": {**_side_document(comparison.b), "alone": alone[1]},
        "differences": [asdict(each) for each in differences(comparison.a, comparison.b, comparison.pairs)],
        "figures": asdict(comparison_stats(comparison)),
        "pairs": [_pair_document(pair) for pair in comparison.pairs],
    }
    return json.dumps(said, indent=1, default=str) + "\n"


def _side_document(side: Side) -> dict[str, object]:
    return {
        "name": side.name,
        "runs": [run.id for run in side.runs],
        "pictures": len(side.pictures),
        "images_per_second": side.images_per_second or None,
        "seconds": side.seconds,
    }


def _pair_document(pair: Pair) -> dict[str, object]:
    like = pair.similarity
    return {
        "prompt_id": str(pair.a.prompt),
        "text": pair.a.text,
        "matched_by": "id" if pair.by_id else "text and seed",
        "a": _picture_document(pair.a),
        "b": _picture_document(pair.b),
        "ssim": like.ssim,
        "clip": like.clip,
        "note": like.note,
    }


def _picture_document(image: Picture) -> dict[str, object]:
    return {
        "prompt_id": str(image.prompt),
        "number": image.number,
        "text": image.text,
        "image_url": image.url,
        "seed": image.seed,
        "score": image.score,
        "used": image.used,
    }
