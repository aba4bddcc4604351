"""A contact sheet: all pictures of the demo on one page, each above its prompt."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL.Image import Image

COLUMNS = 4
PICTURE, MARGIN, CAPTION = 192, 16, 44  # pixels
_PAPER, _INK = (250, 250, 248), (50, 50, 55)


def contact_sheet(pictures: Sequence[tuple[str, Image]]) -> Image:
    """One RGB picture of all of them, COLUMNS in a row, in the order in which they come."""
    from PIL import Image, ImageDraw, ImageFont

    rows = -(-len(pictures) // COLUMNS)
    across, down = PICTURE + MARGIN, PICTURE + CAPTION + MARGIN
    sheet = Image.new("RGB", (COLUMNS * across + MARGIN, rows * down + MARGIN), _PAPER)
    drawing, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (caption, picture) in enumerate(pictures):
        row, column = divmod(number, COLUMNS)
        left, top = MARGIN + column * across, MARGIN + row * down
        sheet.paste(picture.resize((PICTURE, PICTURE), Image.Resampling.BICUBIC), (left, top))
        text = "\n".join(textwrap.wrap(caption, 28)[:2])
        drawing.multiline_text((left, top + PICTURE + 6), text, fill=_INK, font=font)
    return sheet
