"""How alike two pictures are: SSIM by scikit-image, and by a CLIP model where one is given.

Knows pictures as files' bytes, and neither prompts nor where pictures are kept.
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


_SMALLEST: Final = 11
"""Pixels that the window of Wang et al. is wide: smaller pictures have no SSIM."""
_SEEN: Final = 256
"""Pixels of the shorter side at which pictures are compared: structure as it is seen, not grain."""
_PROPORTIONS: Final = 0.01
"""How much width ÷ height may differ, as a part of it, for one picture to be brought to the other's size."""


def check() -> None:
    """Raise ConfigurationError where scikit-image is not there."""
    try:
        import skimage.metrics  # noqa: F401 - whether it is there
    except ImportError:
        raise ConfigurationError("compare needs scikit-image; pip install 'scikit-image>=0.26'") from None


def image_similarity(
    read: tuple[Callable[[], bytes], Callable[[], bytes]],
    clip: Callable[[NDArray[np.uint8], NDArray[np.uint8]], float] | None,
) -> Similarity:
    """Of two pictures, whose files' bytes ``read`` gives; ``clip`` says how alike a model finds their pixels.

    Of two sizes with the same proportions the larger is shrunk to the smaller for SSIM; of other proportions
    there is none: what should be compared with what, nobody could say. A picture that cannot be read makes a
    note and no error.
    """
    try:
        files = read[0](), read[1]()
        a, b = pixels(files[0]), pixels(files[1])
    except (ObjectUnreadable, OSError, ValueError, SyntaxError) as exc:
        return Similarity(note=f"not compared: {exc}")
    if files[0] == files[1]:
        return Similarity(ssim=1.0, clip=1.0 if clip else None, note="the same file")
    similar, note = _similar(a, b, clip)
    ssim, other = _sized(a, b)
    notes = "; ".join(each for each in (other, note) if each)
    return Similarity(ssim=ssim, clip=similar, note=notes or None)


def _similar(
    a: NDArray[np.uint8],
    b: NDArray[np.uint8],
    clip: Callable[[NDArray[np.uint8], NDArray[np.uint8]], float] | None,
) -> tuple[float | None, str | None]:
    try:
        return (clip(a, b) if clip else None), None
    except EvaluationFailed as exc:
        return None, str(exc)


def _sized(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> tuple[float | None, str | None]:
    """The SSIM, and what was done about the sizes, or why there is none."""
    (high, wide), (height, width) = a.shape[:2], b.shape[:2]
    said = f"{wide}×{high} and {width}×{height}"
    if abs((wide / high) / (width / height) - 1) > _PROPORTIONS:
        return None, f"no SSIM: {said} have other proportions"
    small = (min(wide, width), min(high, height))
    if min(small) < _SMALLEST:
        return None, f"no SSIM: a picture of {said} is smaller than {_SMALLEST} pixels"
    return ssim(
        _at(a, small), _at(b, small)
    ), None if a.shape == b.shape else f"{said}, brought to {small[0]}×{small[1]}"


def _at(image: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    whole = Image.fromarray(image)
    return whole if whole.size == size else whole.resize(size, Image.Resampling.LANCZOS)


def ssim(a: Image.Image, b: Image.Image) -> float:
    """The mean structural similarity of two RGB pictures of the same size.

    Wang, Bovik, Sheikh, Simoncelli: Image Quality Assessment (IEEE TIP 13(4), 2004), with their window and
    constants and, as in their later code, first averaged over squares so that the shorter side has some 256
    pixels; the mean of the three channels, since in grey values alone a red and a green shape may agree.
    """
    import numpy as np
    from skimage.metrics import structural_similarity

    square = max(1, round(min(a.size) / _SEEN))
    ours, theirs = (np.asarray(each.reduce(square)) for each in (a, b))
    found = structural_similarity(
        ours,
        theirs,
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(found)


_AT_ONCE: Final = 4
"""Pictures are decoded and compared on few cores, and read over the network in between."""
_One = TypeVar("_One")
_Other = TypeVar("_Other")


def measure_pairs(
    pairs: Sequence[Pair],
    read: Callable[[str], bytes],
    clip: Callable[[NDArray[np.uint8], NDArray[np.uint8]], float] | None,
) -> tuple[Pair, ...]:
    """The pairs, each with how alike its pictures are; ``read`` gives the bytes that a URL means, or raises
    Unreadable, from several threads at once; ``clip`` as ``likeness`` takes it.
    """

    def look(pair: Pair) -> Pair:
        both = partial(read, pair.a.url), partial(read, pair.b.url)
        return replace(pair, similarity=image_similarity(both, clip))

    return tuple(in_parallel(look, pairs))


def in_parallel(function: Callable[[_One], _Other], items: Iterable[_One]) -> Iterator[_Other]:
    """What the function makes of each item, in their order; whoever stops asking leaves nothing waiting."""
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
