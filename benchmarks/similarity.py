"""How far two pictures are apart, by their pixels alone. Knows nothing of how they came about."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Picture = NDArray[np.uint8]

_REACH, _SIGMA = 5, 1.5
_SMALL = ((0.01 * 255) ** 2, (0.03 * 255) ** 2)
"""What keeps SSIM's quotients steady where mean or variance is near zero (the paper's C1 and C2)."""


def mean_difference(one: Picture, other: Picture) -> float:
    """The mean absolute difference of all values, in levels of 255."""
    return float(np.abs(one.astype(np.int16) - other).mean())


def psnr(one: Picture, other: Picture) -> float:
    """The peak signal-to-noise ratio in dB; infinite for equal pictures."""
    squared = float(((one.astype(np.float64) - other) ** 2).mean())
    return 10 * math.log10(255**2 / squared) if squared else math.inf


def ssim(one: Picture, other: Picture) -> float:
    """The mean structural similarity of the pictures' luminance, 1 for equal ones.

    Wang, Bovik, Sheikh, Simoncelli 2004, "Image quality assessment: from error visibility to structural
    similarity", with its own window: 11 × 11, Gaussian, sigma 1.5, where it lies within the picture.
    ``one`` and ``other``: uint8 (height, width, 3), at least 11 pixels a side.
    """
    x, y = _luminance(one), _luminance(other)
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x, variance_y = _blurred(x * x) - mean_x**2, _blurred(y * y) - mean_y**2
    covariance = _blurred(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + _SMALL[0]) / (mean_x**2 + mean_y**2 + _SMALL[0])
    structure = (2 * covariance + _SMALL[1]) / (variance_x + variance_y + _SMALL[1])
    return float((light * structure).mean())


def _luminance(image: Picture) -> NDArray[np.float64]:
    """(height, width), 0 … 255, by the weights of ITU-R BT.601."""
    return np.asarray(image.astype(np.float64) @ np.array([0.299, 0.587, 0.114]))


def _blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The Gaussian mean around each place that the whole window fits in: (height − 10, width − 10)."""
    offsets = np.arange(-_REACH, _REACH + 1)
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for axis in (0, 1):
        length = values.shape[axis] - 2 * _REACH
        windows = [values.take(range(start, start + length), axis) for start in range(len(weights))]
        values = np.tensordot(weights, np.stack(windows), axes=1)
    return values
