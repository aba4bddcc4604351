"""Imperceptible watermarks: whether libraries' marks are found again, what they cost, how they change images.

Tries each library that is installed (``invisible-watermark``, ``blind-watermark``; neither belongs to the
project) on images of flat scenes and of textures. A mark of 32 bits is found if 29 of them come back: by
chance that happens to one image in 780,000.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from benchmarks.results import RESULTS, Result, report
from text2img.demo.scenes import Scene, draw

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

BITS = [int(bit) for bit in f"{0x5EED0A17:032b}"]
_FOUND = 29
_SCENES = (
    "a large red circle on a blue background",
    "a large green triangle on a black background",
)
SIDES = (512, 1024)


@dataclass(frozen=True, slots=True)
class Method:
    """A library's method: ``embed`` returns marked pixels (RGB), ``extract`` the bits that it reads."""

    name: str
    embed: Callable[[Pixels], Pixels]
    extract: Callable[[Pixels], Sequence[float]]


def methods() -> list[Method]:
    """The methods of the libraries that are installed."""
    found: list[Method] = []
    with suppress(ImportError):
        library: Any = import_module("imwatermark")
        found.extend(_invisible(library, name) for name in ("dwtDct", "dwtDctSvd", "rivaGan"))
    with suppress(ImportError):
        found.append(_blind(import_module("blind_watermark")))
    return found


def _invisible(library: Any, name: str) -> Method:
    encoder, decoder = library.WatermarkEncoder(), library.WatermarkDecoder("bits", len(BITS))
    if name == "rivaGan":
        encoder.loadModel()
        decoder.loadModel()
    encoder.set_watermark("bits", BITS)
    return Method(
        f"invisible-watermark, {name}",
        lambda pixels: np.ascontiguousarray(encoder.encode(pixels[..., ::-1], name)[..., ::-1]),
        lambda pixels: list(decoder.decode(np.ascontiguousarray(pixels[..., ::-1]), name)),
    )


def _blind(library: Any) -> Method:
    library.bw_notes.close()

    def embed(pixels: Pixels) -> Pixels:
        mark = library.WaterMark()
        mark.read_img(img=np.ascontiguousarray(pixels[..., ::-1]).astype(np.float32))
        mark.read_wm(np.array(BITS, bool), mode="bit")
        return np.asarray(np.clip(mark.embed().round(), 0, 255)[..., ::-1], np.uint8)

    def extract(pixels: Pixels) -> Sequence[float]:
        image = np.ascontiguousarray(pixels[..., ::-1]).astype(np.float32)
        read: Sequence[float] = library.WaterMark().extract(embed_img=image, wm_shape=len(BITS), mode="bit")
        return read

    return Method("blind-watermark", embed, extract)


def images(side: int) -> list[Pixels]:
    """Flat scenes as the demo's model draws them, and textures whose spectrum falls as a photograph's."""
    random = Random(7)  # noqa: S311 - no cryptography
    scenes = [np.asarray(draw(Scene.parse(text), random, side), np.uint8) for text in _SCENES]
    return [*scenes, *(_texture(side, seed) for seed in range(2))]


def _texture(side: int, seed: int) -> Pixels:
    random = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.fftfreq(side)[None])
    frequencies[0, 0] = 1
    layers = [
        np.fft.ifft2(np.fft.fft2(random.normal(size=(side, side))) / frequencies).real for _ in range(3)
    ]
    mixed = np.stack(layers, axis=2) @ np.array([[1, 0.8, 0.7], [0.1, 0.4, 0.3], [0.1, 0.1, 0.4]])
    spread = 48 * (mixed - mixed.mean()) / mixed.std() + 128
    return np.asarray(np.clip(spread, 0, 255), np.uint8)


def _jpeg(pixels: Pixels, quality: int) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _resized(pixels: Pixels, factor: float) -> Pixels:
    height, width = pixels.shape[:2]
    size = (round(width * factor), round(height * factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _cropped(pixels: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    return np.ascontiguousarray(pixels[height // 20 : -(height // 20), width // 20 : -(width // 20)])


CHANGES: Mapping[str, Callable[[Pixels], Sequence[Pixels]]] = {
    "as it is": lambda pixels: [pixels],
    "JPEG 90": lambda pixels: [_jpeg(pixels, 90)],
    "JPEG 75": lambda pixels: [_jpeg(pixels, 75)],
    # A reader may guess that it was made smaller, and enlarge it again.
    "half the size": lambda pixels: [_resized(pixels, 0.5), _resized(_resized(pixels, 0.5), 2)],
    "10 % cropped": lambda pixels: [_cropped(pixels)],
}


def _is_found(method: Method, attempts: Sequence[Pixels]) -> bool:
    for pixels in attempts:
        with suppress(Exception):  # a library's error is a mark that was not found
            read = [round(float(bit)) for bit in method.extract(pixels)]
            if sum(a == b for a, b in zip(read, BITS, strict=True)) >= _FOUND:
                return True
    return False


def _psnr(marked: Pixels, plain: Pixels) -> float:
    error = float(((marked.astype(np.float64) - plain) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def row(method: Method, side: int) -> dict[str, Any]:
    """What became of the method's marks on images of that size."""
    plain, marked, took = images(side), [], []
    for pixels in plain:
        begun = time.process_time()
        marked.append(method.embed(pixels))
        took.append(time.process_time() - begun)
    unmarked = sum(_is_found(method, [pixels]) for pixels in plain)
    return {
        "method": method.name,
        "pixels": f"{side}²",
        **{
            name: f"{sum(_is_found(method, change(pixels)) for pixels in marked)} of {len(marked)}"
            for name, change in CHANGES.items()
        },
        "found unmarked": unmarked,
        "PSNR, dB": f"{fmean(_psnr(*pair) for pair in zip(marked, plain, strict=True)):.1f}",
        "ms a megapixel": round(median(took) * 1e9 / side**2),
    }


def main() -> int:
    """Read the options, measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watermark", description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="pixels (default: 512 1024)")
    parser.add_argument("--method", default="", help="only methods whose name contains this")
    options = parser.parse_args()
    there = [method for method in methods() if options.method in method.name]
    if not there:
        print("neither invisible-watermark nor blind-watermark is installed: pip install --no-deps them")
        return 2
    rows: list[dict[str, Any]] = []
    for side in options.sides:
        for method in there:
            rows.append(row(method, side))
            print(rows[-1], flush=True)
    result = Result(
        benchmark="watermark",
        checks=[],
        settings={
            "bits": len(BITS),
            "found": _FOUND,
            "images": len(images(64)),
            "sides": list(options.sides),
        },
        rows=rows,
        note="Half of the images are flat scenes, half are textures. Times are of one process's processor.",
    )
    result.save(options.output)
    print(report(result))
    return result.status


if __name__ == "__main__":
    raise SystemExit(main())
