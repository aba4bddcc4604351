"""Similarity of two images: SSIM by scikit-image, and the similarity by a CLIP model if one is given.

Images are the bytes of their files.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from PIL import Image

from text2img.errors import ConfigurationError, EvaluationFailed, ObjectUnreadable
from text2img.images.contact_sheet import pixels
from text2img.reports.comparison import Similarity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from text2img.reports.comparison import Pair


_MIN_SIDE: Final = 11
"""Pixels; the width of the window of Wang et al. Smaller images have no SSIM."""
_COMPARED_SIDE: Final = 256
"""Pixels of the shorter side at which images are compared: visible structure, not grain."""
_MAX_RATIO_DIFFERENCE: Final = 0.01
"""Largest relative difference of width ÷ height at which one image is resized to the other's size."""


def check() -> None:
    """Raise ConfigurationError if scikit-image is not installed."""
    try:
        import skimage.metrics  # noqa: F401 - to see if it is installed
    except ImportError:
        raise ConfigurationError("compare needs scikit-image; pip install 'scikit-image>=0.26'") from None


def image_similarity(
    read: tuple[Callable[[], bytes], Callable[[], bytes]],
    clip: Callable[[NDArray[np.uint8], NDArray[np.uint8]], float] | None,
) -> Similarity:
    """Return the similarity of two images, whose files' bytes ``read`` returns.

    ``clip`` returns the similarity of their pixels by a model. For SSIM, the larger of two sizes is shrunk to
    the smaller if both have the same proportions. Other proportions have no SSIM: their pixels do not
    correspond. An image that cannot be read yields a note, not an error.
    """
    try:
        files = read[0](), read[1]()
        a, b = pixels(files[0]), pixels(files[1])
    except (ObjectUnreadable, OSError, ValueError, SyntaxError) as exc:
        return Similarity(note=f"not compared: {exc}")
    if files[0] == files[1]:
        return Similarity(ssim=1.0, clip=1.0 if clip else None, note="the same file")
    clip_similarity, clip_note = _clip_similarity(a, b, clip)
    ssim, ssim_note = _resized_ssim(a, b)
    notes = "; ".join(note for note in (ssim_note, clip_note) if note)
    return Similarity(ssim=ssim, clip=clip_similarity, note=notes or None)


def _clip_similarity(
    a: NDArray[np.uint8],
    b: NDArray[np.uint8],
    clip: Callable[[NDArray[np.uint8], NDArray[np.uint8]], float] | None,
) -> tuple[float | None, str | None]:
    try:
        return (clip(a, b) if clip else None), None
    except EvaluationFailed as exc:
        return None, str(exc)


def _resized_ssim(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> tuple[float | None, str | None]:
    """Return the SSIM, and a note of how the images were resized, or why there is no SSIM."""
    (height_a, width_a), (height_b, width_b) = a.shape[:2], b.shape[:2]
    sizes = f"{width_a}×{height_a} and {width_b}×{height_b}"
    if abs((width_a / height_a) / (width_b / height_b) - 1) > _MAX_RATIO_DIFFERENCE:
        return None, f"no SSIM: {sizes} have other proportions"
    small = (min(width_a, width_b), min(height_a, height_b))
    if min(small) < _MIN_SIDE:
        return None, f"no SSIM: an image of {sizes} is smaller than {_MIN_SIDE} pixels"
    note = None if a.shape == b.shape else f"{sizes}, resized to {small[0]}×{small[1]}"
    return ssim(_resized(a, small), _resized(b, small)), note


def _resized(pixels: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    image = Image.fromarray(pixels)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def ssim(a: Image.Image, b: Image.Image) -> float:
    """Return the mean structural similarity of two RGB images of the same size.

    Wang, Bovik, Sheikh, Simoncelli: Image Quality Assessment (IEEE TIP 13(4), 2004), with their window and
    constants. As in their later code, the images are first averaged over squares, so that the shorter side
    has about 256 pixels. The result is the mean of the three channels: in grey values alone, a red and a
    green shape may be equal.
    """
    import numpy as np
    from skimage.metrics import structural_similarity

    square = max(1, round(min(a.size) / _COMPARED_SIDE))
    pixels_a, pixels_b = (np.asarray(image.reduce(square)) for image in (a, b))
    similarity = structural_similarity(
        pixels_a,
        pixels_b,
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(similarity)


_MAX_CONCURRENCY: Final = 4
"""Images are decoded and compared on few cores, and read over the network in between."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def measure_pairs(
    pairs: Sequence[Pair],
    read: Callable[[str], bytes],
    clip: Callable[[NDArray[np.uint8], NDArray[np.uint8]], float] | None,
) -> tuple[Pair, ...]:
    """Return the pairs with the similarity of their images.

    ``read`` returns the bytes at a URL, or raises ObjectUnreadable; several threads call it at once. ``clip``
    is as for ``image_similarity``.
    """

    def measure(pair: Pair) -> Pair:
        readers = partial(read, pair.a.place), partial(read, pair.b.place)
        return replace(pair, similarity=image_similarity(readers, clip))

    return tuple(in_parallel(measure, pairs))


def in_parallel(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """Yield the function's result for each item, in order; closing the iterator cancels pending calls."""
    pool = ThreadPoolExecutor(_MAX_CONCURRENCY)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
