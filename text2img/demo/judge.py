"""What a picture really shows, told from its pixels alone: no model, nothing learned.

The judge finds the two colours, takes the shape's mask, and compares it with silhouettes. It says None
about whatever it cannot make out. It knows the demo's world and nothing of how a picture came about.
"""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from text2img.demo.scenes import COLOURS, SHAPES, SIZES, Scene, outline

if TYPE_CHECKING:
    from numpy.typing import NDArray

WIDTH = 128  # pixels; other pictures are brought to this width first
BORDER = 4  # pixels along each edge which always belong to the background
MIDDLE = 8  # the width of the square in the middle which always belongs to the shape
FURTHEST = 110.0  # from a named colour, in RGB: beyond this a colour has no name
LEAST_OVERLAP = 0.8  # intersection over union with the best silhouette: below this a shape has no name
SIZE_SLACK = 0.15  # how far a shape may leave its size's range, as a part of the range's ends
TURNS = {"circle": 0, "square": 4, "triangle": 3, "star": 5}  # a shape repeats itself so often in one turn


@dataclass(frozen=True, slots=True)
class Seen:
    """What the judge made out; None where it could not tell."""

    size: str | None
    colour: str | None
    shape: str | None
    background: str | None

    def shows(self, scene: Scene) -> bool:
        """Whether the picture shows this scene, in every attribute."""
        return not self.differences(scene)

    def differences(self, scene: Scene) -> tuple[str, ...]:
        """The attributes in which the picture is not, or not plainly, this scene."""
        return tuple(
            field.name for field in fields(self) if getattr(self, field.name) != getattr(scene, field.name)
        )


def judge(image: Image.Image) -> Seen:
    """What the picture shows, at whatever size it comes."""
    pixels = np.asarray(image.convert("RGB").resize((WIDTH, WIDTH), Image.Resampling.BOX), dtype=np.float64)
    inside, outside = _middle_colour(pixels), _border_colour(pixels)
    colour, background = _name(inside), _name(outside)
    if colour is None or background is None or colour == background:
        return Seen(None, colour if colour != background else None, None, background)
    mask = _mask(pixels, inside, outside)
    shape, radius = _shape(mask)
    return Seen(_size(radius), colour, shape, background)


def _middle_colour(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median colour of the middle: (3,)."""
    low, high = (WIDTH - MIDDLE) // 2, (WIDTH + MIDDLE) // 2
    return np.asarray(np.median(pixels[low:high, low:high].reshape(-1, 3), axis=0))


def _border_colour(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median colour of the four edges: (3,)."""
    edge = np.ones((WIDTH, WIDTH), dtype=bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    return np.asarray(np.median(pixels[edge], axis=0))


def _name(colour: NDArray[np.float64]) -> str | None:
    """The nearest named colour, unless even that is far."""
    distances = {name: math.dist(colour, named) for name, named in COLOURS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] <= FURTHEST else None


def _mask(
    pixels: NDArray[np.float64], inside: NDArray[np.float64], outside: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """The pixels that are nearer to the shape's colour than to the background's: (128, 128)."""
    nearer = ((pixels - inside) ** 2).sum(axis=2) < ((pixels - outside) ** 2).sum(axis=2)
    return np.asarray(nearer)


def _shape(mask: NDArray[np.bool_]) -> tuple[str | None, float | None]:
    """The shape whose silhouette, of the same area, place and tilt, overlaps the mask best; its radius."""
    rows, columns = np.nonzero(mask)
    if not len(rows):  # a median of three channels may be a colour that no pixel has
        return None, None
    centre = (float(columns.mean()) + 0.5, float(rows.mean()) + 0.5)
    right, down = columns + np.float64(0.5 - centre[0]), rows + np.float64(0.5 - centre[1])
    weights, angles = np.hypot(right, down) ** 3, np.arctan2(down, right)
    best, shape, radius = 0.0, None, None
    for candidate in SHAPES:
        reach = math.sqrt(len(rows) / _unit_area(candidate))
        tilt = _tilt(candidate, weights, angles)
        overlap = _overlap(mask, silhouette(candidate, reach, tilt, centre))
        if overlap > best:
            best, shape, radius = overlap, candidate, reach
    return (shape, radius) if best >= LEAST_OVERLAP else (None, None)


def silhouette(shape: str, radius: float, tilt: float, centre: tuple[float, float]) -> NDArray[np.bool_]:
    """The mask of a perfect shape; radius and centre in pixels: (128, 128)."""
    fine = 2  # pixels for one, so that the corners fall where they should
    picture = Image.new("1", (WIDTH * fine, WIDTH * fine))
    ImageDraw.Draw(picture).polygon(
        [(x * fine, y * fine) for x, y in outline(shape, radius, tilt, centre)], fill=1
    )
    parts = np.asarray(picture, dtype=np.uint8).reshape(WIDTH, fine, WIDTH, fine)
    return np.asarray(2 * parts.sum(axis=(1, 3), dtype=np.uint8) >= fine**2)


def _overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks, 0…1."""
    return float((one & other).sum() / (one | other).sum())


@cache
def _unit_area(shape: str) -> float:
    """The area of the shape with a radius of 1."""
    corners = outline(shape, 1.0, 0.0, (0.0, 0.0))
    pairs = zip(corners, corners[1:] + corners[:1], strict=True)
    return abs(sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in pairs)) / 2


def _tilt(shape: str, weights: NDArray[np.float64], angles: NDArray[np.float64]) -> float:
    """The tilt, in radians, at which the shape's corners lie where the mask reaches furthest.

    The mask's pixels, each at its angle and weighted by its distance, sum up to a wave that repeats as often
    in one turn as the shape does; its phase is the tilt, from which that of the upright shape is taken.
    """
    turns = TURNS[shape]
    if not turns:
        return 0.0
    phase = cmath.phase(complex(np.sum(weights * np.exp(1j * turns * angles))))
    upright = turns * (math.pi / 4 if shape == "square" else -math.pi / 2)
    return math.remainder(phase - upright, math.tau) / turns


def _size(radius: float | None) -> str | None:
    """The size whose range, with some slack, holds the radius (in pixels)."""
    if radius is None:
        return None
    for size, (least, greatest) in SIZES.items():
        if least * (1 - SIZE_SLACK) <= radius / WIDTH <= greatest * (1 + SIZE_SLACK):
            return size
    return None
