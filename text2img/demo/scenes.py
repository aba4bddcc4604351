"""The demo model's scenes: one coloured shape on a background of another colour.

Lists every scene that the model was trained on, writes and parses captions, and draws scenes and contact
sheets. Pillow is imported only when something is drawn.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from random import Random

    from PIL.Image import Image


RGB = tuple[int, int, int]
Point = tuple[float, float]

# Near the eight corners of the RGB cube, the greatest distances possible: guidance pushes a colour towards
# its corner and so away from the others, while an orange would be pushed into red or yellow.
COLOURS: dict[str, RGB] = {
    "red": (225, 35, 40),
    "yellow": (250, 220, 40),
    "green": (25, 165, 60),
    "cyan": (60, 210, 240),
    "blue": (30, 60, 215),
    "purple": (185, 45, 205),
    "black": (18, 18, 22),
    "white": (248, 248, 246),
}
SHAPES = ("circle", "square", "triangle", "star")

# A shape's radius as a fraction of the image's width: the minimum and the maximum of each size.
SIZES: dict[str, tuple[float, float]] = {"small": (0.155, 0.185), "large": (0.30, 0.34)}

MAX_OFFSET = 0.035  # of the width, in either direction: the image's centre always lies within the shape
MAX_TILT = math.radians(10)
OVERSAMPLING = 4

# From the centre to a corner, in radii: chosen so that all shapes of one size appear equally large.
_CORNER_DISTANCE = {"square": 1.22, "triangle": 1.36, "star": 1.36}
_STAR_WAIST = 0.5  # the inner corners' distance, as a fraction of the outer ones'


@dataclass(frozen=True, slots=True)
class Scene:
    """A scene: a shape's size, colour and kind, and the background's colour."""

    size: str
    colour: str
    shape: str
    background: str

    @property
    def caption(self) -> str:
        """The caption that the model was trained on for this scene."""
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background"

    @classmethod
    def parse(cls, caption: str) -> Scene:
        """Return the scene of a training caption; raise ValueError for any other text."""
        match caption.lower().split():
            case ["a", size, colour, shape, "on", "a", background, "background"] if (
                size in SIZES and colour in COLOURS and shape in SHAPES and background in COLOURS
            ):
                return cls(size, colour, shape, background)
        raise ValueError(f"not a caption of a demo scene: {caption!r}")


def all_scenes() -> Iterator[Scene]:
    """Yield the 448 scenes of the demo, always in the same order."""
    for size, colour, shape, background in product(SIZES, COLOURS, SHAPES, COLOURS):
        if colour != background:
            yield Scene(size, colour, shape, background)


def outline(shape: str, radius: float, tilt: float, centre: Point) -> list[Point]:
    """Return the corners of a shape; `tilt` in radians, clockwise. A circle has 90 corners."""
    corners, waist = {
        "circle": (90, 1.0),
        "square": (4, 1.0),
        "triangle": (3, 1.0),
        "star": (10, _STAR_WAIST),
    }[shape]
    reach = radius * _CORNER_DISTANCE.get(shape, 1.0)
    first = tilt + (math.pi / 4 if shape == "square" else -math.pi / 2)  # a triangle and a star point upwards
    points = []
    for corner in range(corners):
        angle = first + math.tau * corner / corners
        distance = reach * (waist if corner % 2 else 1.0)
        points.append((centre[0] + distance * math.cos(angle), centre[1] + distance * math.sin(angle)))
    return points


def draw(scene: Scene, rng: Random, width: int = 128) -> Image:
    """Draw the scene, `width` × `width` pixels; `rng` determines the exact size, position and tilt."""
    from PIL import Image, ImageDraw

    full = width * OVERSAMPLING
    radius = full * rng.uniform(*SIZES[scene.size])
    x, y = (full * (0.5 + rng.uniform(-MAX_OFFSET, MAX_OFFSET)) for _ in range(2))
    tilt = rng.uniform(-MAX_TILT, MAX_TILT)
    image = Image.new("RGB", (full, full), COLOURS[scene.background])
    ImageDraw.Draw(image).polygon(outline(scene.shape, radius, tilt, (x, y)), fill=COLOURS[scene.colour])
    return image.reduce(OVERSAMPLING)


COLUMNS = 4
IMAGE_SIDE, MARGIN, CAPTION_HEIGHT = 192, 16, 44  # pixels
_PAPER, _INK = (250, 250, 248), (50, 50, 55)


def contact_sheet(images: Sequence[tuple[str, Image]]) -> Image:
    """Return one RGB image of all captioned images, COLUMNS in a row, in order."""
    from PIL import Image, ImageDraw, ImageFont

    rows = -(-len(images) // COLUMNS)
    cell_width, cell_height = IMAGE_SIDE + MARGIN, IMAGE_SIDE + CAPTION_HEIGHT + MARGIN
    sheet = Image.new("RGB", (COLUMNS * cell_width + MARGIN, rows * cell_height + MARGIN), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (caption, image) in enumerate(images):
        row, column = divmod(number, COLUMNS)
        left, top = MARGIN + column * cell_width, MARGIN + row * cell_height
        sheet.paste(image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC), (left, top))
        text = "\n".join(textwrap.wrap(caption, 28)[:2])
        draw.multiline_text((left, top + IMAGE_SIDE + 6), text, fill=_INK, font=font)
    return sheet
