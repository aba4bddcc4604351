"""Width and height: what was asked for in pixels, or as an aspect ratio of the model's own size.

Knows no model: its own size, and what a size must be a multiple of, are told.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from text2img.prompts.validation import check_pixels, check_word

if TYPE_CHECKING:
    from collections.abc import Sequence

    from text2img.prompts.requested import Wishes

SIDES: Final = {"1:1": (1.0, 1.0), "2:2": (1.5, 1.5), "1:2": (1.0, 2.0)}
"""Those that mean a size: width and height in sides of the model's own square. Where that is 512×512 they are
512×512, 768×768 and 512×1024."""
ASPECT_RATIOS: Final = (*SIDES, "2:1", "3:2", "2:3", "4:3", "3:4", "16:9", "9:16")
"""All others have as many pixels as the model's own size, within rounding."""


def settle_size(wishes: Sequence[Wishes], multiple: int) -> tuple[int, int, str | None]:
    """Width and height in pixels, and the aspect ratio, if one decided on any of the two.

    Of the wishes, the most specific first, each settles what those before it have left open: by its width and
    height, then by its aspect ratio. The last are the model's own size, in full. An aspect ratio that finds
    one side settled keeps to that side. Raises PromptFailed (``invalid_parameters``).
    """
    own = check_pixels("width", wishes[-1].width), check_pixels("height", wishes[-1].height)
    width: int | None = None
    height: int | None = None
    decided = None
    for wish in wishes:
        if width is None and wish.width is not None:
            width = check_pixels("width", wish.width)
        if height is None and wish.height is not None:
            height = check_pixels("height", wish.height)
        ratio = None if wish.aspect_ratio is None else check_aspect_ratio("aspect_ratio", wish.aspect_ratio)
        if ratio is not None and (width is None or height is None):
            width, height = _sized(ratio, (width, height), own, multiple)
            decided = ratio
        if width is not None and height is not None:
            return check_pixels("width", width), check_pixels("height", height), decided
    raise ValueError("the last wishes leave the size open")


def check_aspect_ratio(name: str, value: object) -> str:
    """One of ASPECT_RATIOS."""
    return check_word(name, value, ASPECT_RATIOS)


def _sized(
    ratio: str, given: tuple[int | None, int | None], own: tuple[int, int], multiple: int
) -> tuple[int, int]:
    """Width and height of that ratio, multiples of ``multiple``; a side that is given stays as it is."""
    across, down = map(int, ratio.split(":"))
    width, height = given
    if width is not None:
        return width, _rounded(width * down / across, multiple)
    if height is not None:
        return _rounded(height * across / down, multiple), height
    side = math.sqrt(own[0] * own[1])
    if ratio in SIDES:
        wide, high = SIDES[ratio]
        return _rounded(side * wide, multiple), _rounded(side * high, multiple)
    stretch = math.sqrt(across / down)
    return _rounded(side * stretch, multiple), _rounded(side / stretch, multiple)


def _rounded(pixels: float, multiple: int) -> int:
    return max(1, math.floor(pixels / multiple + 0.5)) * multiple
