"""The judge of the demo's images: it recognizes a scene from the pixels alone, without a model.

It finds the two colours, takes the shape's mask, and compares it with silhouettes. An attribute that it
cannot recognize is None.
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

WIDTH = 128  # pixels; other images are resized to this width first
BORDER = 4  # pixels along each edge that always belong to the background
CENTRE_WIDTH = 8  # pixels: the width of the central square, which always belongs to the shape
MAX_COLOUR_DISTANCE = 110.0  # in RGB, from a named colour; a colour further away has no name
MIN_OVERLAP = 0.8  # intersection over union with the best silhouette; a shape with less has no name
SIZE_SLACK = 0.15  # tolerance of a size's range, as a fraction of its bounds
SYMMETRY = {"circle": 0, "square": 4, "triangle": 3, "star": 5}  # the order of rotational symmetry


@dataclass(frozen=True, slots=True)
class Seen:
    """The recognized attributes; None for one that could not be recognized."""

    size: str | None
    colour: str | None
    shape: str | None
    background: str | None

    def shows(self, scene: Scene) -> bool:
        """Return True if every attribute matches this scene."""
        return not self.differences(scene)

    def differences(self, scene: Scene) -> tuple[str, ...]:
        """Return the attributes that differ from this scene, or were not recognized."""
        return tuple(
            field.name for field in fields(self) if getattr(self, field.name) != getattr(scene, field.name)
        )


def judge(image: Image.Image) -> Seen:
    """Recognize what an image of any size shows."""
    pixels = np.asarray(image.convert("RGB").resize((WIDTH, WIDTH), Image.Resampling.BOX), dtype=np.float64)
    inside, outside = _centre_colour(pixels), _border_colour(pixels)
    colour, background = _colour_name(inside), _colour_name(outside)
    if colour is None or background is None or colour == background:
        return Seen(None, colour if colour != background else None, None, background)
    mask = _mask(pixels, inside, outside)
    shape, radius = _shape(mask)
    return Seen(_size(radius), colour, shape, background)


def _centre_colour(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median colour of the central square: (3,)."""
    low, high = (WIDTH - CENTRE_WIDTH) // 2, (WIDTH + CENTRE_WIDTH) // 2
    return np.asarray(np.median(pixels[low:high, low:high].reshape(-1, 3), axis=0))


def _border_colour(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median colour of the four edges: (3,)."""
    edge = np.ones((WIDTH, WIDTH), dtype=bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    return np.asarray(np.median(pixels[edge], axis=0))


def _colour_name(colour: NDArray[np.float64]) -> str | None:
    """Return the name of the nearest named colour, or None if it is too far away."""
    distances = {name: math.dist(colour, named) for name, named in COLOURS.items()}
    nearest = min(distances, key=lambda name: distances[name])
    return nearest if distances[nearest] <= MAX_COLOUR_DISTANCE else None


def _mask(
    pixels: NDArray[np.float64], inside: NDArray[np.float64], outside: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Return the pixels that are nearer to the shape's colour than to the background's: (128, 128)."""
    nearer = ((pixels - inside) ** 2).sum(axis=2) < ((pixels - outside) ** 2).sum(axis=2)
    return np.asarray(nearer)


def _shape(mask: NDArray[np.bool_]) -> tuple[str | None, float | None]:
    """Return the shape whose silhouette overlaps the mask best, and its radius, or None for both.

    Each silhouette has the mask's area, position and tilt.
    """
    rows, columns = np.nonzero(mask)
    if not len(rows):  # the median of three channels may be a colour that no pixel has
        return None, None
    centre = (float(columns.mean()) + 0.5, float(rows.mean()) + 0.5)
    right, down = columns + np.float64(0.5 - centre[0]), rows + np.float64(0.5 - centre[1])
    weights, angles = np.hypot(right, down) ** 3, np.arctan2(down, right)
    best, shape, radius = 0.0, None, None
    for candidate in SHAPES:
        candidate_radius = math.sqrt(len(rows) / _unit_area(candidate))
        tilt = _tilt(candidate, weights, angles)
        overlap = _overlap(mask, silhouette(candidate, candidate_radius, tilt, centre))
        if overlap > best:
            best, shape, radius = overlap, candidate, candidate_radius
    return (shape, radius) if best >= MIN_OVERLAP else (None, None)


def silhouette(shape: str, radius: float, tilt: float, centre: tuple[float, float]) -> NDArray[np.bool_]:
    """Return the mask of a perfect shape; radius and centre in pixels: (128, 128)."""
    scale = 2  # oversampling, for precise corners
    image = Image.new("1", (WIDTH * scale, WIDTH * scale))
    ImageDraw.Draw(image).polygon(
        [(x * scale, y * scale) for x, y in outline(shape, radius, tilt, centre)], fill=1
    )
    parts = np.asarray(image, dtype=np.uint8).reshape(WIDTH, scale, WIDTH, scale)
    return np.asarray(2 * parts.sum(axis=(1, 3), dtype=np.uint8) >= scale**2)


def _overlap(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Return the intersection over union of two masks, 0…1."""
    return float((first & second).sum() / (first | second).sum())


@cache
def _unit_area(shape: str) -> float:
    """Return the area of the shape with a radius of 1."""
    corners = outline(shape, 1.0, 0.0, (0.0, 0.0))
    pairs = zip(corners, corners[1:] + corners[:1], strict=True)
    return abs(sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in pairs)) / 2


def _tilt(shape: str, weights: NDArray[np.float64], angles: NDArray[np.float64]) -> float:
    """Return the tilt, in radians, that places the shape's corners where the mask reaches furthest.

    The mask's pixels, weighted by distance, form a function of the angle. The tilt is the phase of its
    harmonic of the shape's symmetry order, relative to the upright shape's.
    """
    symmetry = SYMMETRY[shape]
    if not symmetry:
        return 0.0
    phase = cmath.phase(complex(np.sum(weights * np.exp(1j * symmetry * angles))))
    upright = symmetry * (math.pi / 4 if shape == "square" else -math.pi / 2)
    return math.remainder(phase - upright, math.tau) / symmetry


def _size(radius: float | None) -> str | None:
    """Return the size whose range, with SIZE_SLACK, includes the radius (in pixels), or None."""
    if radius is None:
        return None
    for size, (smallest, largest) in SIZES.items():
        if smallest * (1 - SIZE_SLACK) <= radius / WIDTH <= largest * (1 + SIZE_SLACK):
            return size
    return None
