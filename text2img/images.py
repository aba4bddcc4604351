"""Pixels → a file: a PNG that carries the parameters it was made with. Knows no model and no storage."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

from text2img import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from text2img.prompts import Request

CONTENT_TYPE = "image/png"
ENDING = ".png"
_RLE = 3  # zlib's Z_RLE: at level 1 three times as fast as the default level 6, and no larger


def parameters(request: Request, *, scheduler: str, model: str, revision: str | None) -> Mapping[str, object]:
    """Everything it takes to make the same picture again."""
    wanted = request.parameters
    return {
        "prompt": request.text,
        "negative_prompt": wanted.negative_prompt,
        "seed": wanted.seed,
        "num_inference_steps": wanted.num_inference_steps,
        "guidance_scale": wanted.guidance_scale,
        "width": wanted.width,
        "height": wanted.height,
        "scheduler": scheduler,
        "model": model,
        "revision": revision,
        "software": f"text2img {__version__}",
    }


def encode_png(pixels: NDArray[np.uint8], parameters: Mapping[str, object]) -> bytes:
    """A PNG file of ``pixels`` (uint8, (height, width, 3), RGB), the same bytes for the same arguments.

    ``parameters`` stands in it as one JSON object, in an iTXt chunk (PNG 1.2, 11.3.4.5: UTF-8) of that name.
    """
    from PIL import Image, PngImagePlugin

    text = PngImagePlugin.PngInfo()
    text.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1, compress_type=_RLE, pnginfo=text)
    return file.getvalue()
