"""A comparison as JSON: everything that was found, for other programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from text2img.reports.comparison.matching import differences
from text2img.reports.comparison.statistics import figures

if TYPE_CHECKING:
    from text2img.reports.comparison import Comparison, Pair, Picture, Side


def document(comparison: Comparison) -> str:
    """One JSON object, in ASCII, which ends with a line's end."""
    alone = comparison.alone
    said = {
        "a": {**_side(comparison.a), "alone": alone[0]},
        "b": {**_side(comparison.b), "alone": alone[1]},
        "differences": [asdict(each) for each in differences(comparison.a, comparison.b, comparison.pairs)],
        "figures": asdict(figures(comparison)),
        "pairs": [_pair(pair) for pair in comparison.pairs],
    }
    return json.dumps(said, indent=1, default=str) + "\n"


def _side(side: Side) -> dict[str, object]:
    return {
        "name": side.name,
        "runs": [run.id for run in side.runs],
        "pictures": len(side.pictures),
        "images_per_second": side.images_per_second or None,
        "seconds": side.seconds,
    }


def _pair(pair: Pair) -> dict[str, object]:
    like = pair.likeness
    return {
        "prompt_id": str(pair.a.prompt),
        "text": pair.a.text,
        "matched_by": "id" if pair.by_id else "text and seed",
        "a": _picture(pair.a),
        "b": _picture(pair.b),
        "ssim": like.ssim,
        "clip": like.clip,
        "note": like.note,
    }


def _picture(picture: Picture) -> dict[str, object]:
    return {
        "prompt_id": str(picture.prompt),
        "number": picture.number,
        "text": picture.text,
        "image_url": picture.url,
        "seed": picture.seed,
        "score": picture.score,
        "used": picture.used,
    }
