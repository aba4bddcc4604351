"""Pixels → a file: signed where an artist's name is asked for, in the format that is asked for, with the
parameters it was made with. Knows no model and no storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from text2img import __version__
from text2img.prompts.parameters import STYLE_CHECKS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from text2img.images.signature import Signer
    from text2img.prompts import Parameters, Request

POSITION, OPACITY, FORMAT = "bottom-right", 128, "png"
"""What a picture gets where nobody wishes otherwise."""


@dataclass(frozen=True, slots=True)
class File:
    """A picture's file; ``ending`` (with its dot) is how its name shall end."""

    data: bytes
    content_type: str
    ending: str


class Encoder:
    """Pictures' files, the same bytes for the same arguments. Safe to use from several threads.

    ``signature_font`` is a font's file; without one the bundled font signs. Raises ConfigurationError where
    that file is no font.
    """

    def __init__(self, signature_font: str | None = None) -> None:
        self._path = signature_font
        if signature_font:
            _ = self._signer.font

    @cached_property
    def _signer(self) -> Signer:
        from text2img.images.signature import Signer

        return Signer(self._path)

    def check(self, wanted: Parameters) -> None:
        """Raise PromptFailed (``invalid_parameters``) for a name that cannot be drawn on such a picture."""
        if wanted.artist_name is not None:
            self._signer.check(wanted.artist_name, wanted.width, wanted.height)

    def encode(self, pixels: NDArray[np.uint8], wanted: Parameters, parameters: Mapping[str, object]) -> File:
        """The file of ``pixels`` (uint8, (height, width, 3), RGB), with ``parameters`` in it.

        Raises PromptFailed as ``check`` does.
        """
        from PIL import Image

        from text2img.images.formats import FORMATS, encode

        picture = Image.fromarray(pixels)
        if wanted.artist_name is not None:
            opacity = OPACITY if wanted.signature_opacity is None else wanted.signature_opacity
            position = wanted.signature_position or POSITION
            picture = self._signer.sign(picture, wanted.artist_name, position, opacity)
        kind = FORMATS[wanted.image_format or FORMAT]
        return File(encode(picture, parameters, kind, wanted.image_quality), kind.content_type, kind.ending)


def parameters(
    request: Request,
    *,
    scheduler: str,
    model: str,
    revision: str | None,
    approximations: Mapping[str, object],
) -> Mapping[str, object]:
    """Everything it takes to make the same picture again."""
    wanted = request.parameters
    style = {name: getattr(wanted, name) for name in STYLE_CHECKS}
    return {
        "prompt": request.text,
        "negative_prompt": wanted.negative_prompt,
        "seed": wanted.seed,
        "num_inference_steps": wanted.num_inference_steps,
        "guidance_scale": wanted.guidance_scale,
        "width": wanted.width,
        "height": wanted.height,
        "scheduler": scheduler,
        **({"loras": [lora.document for lora in wanted.loras]} if wanted.loras else {}),
        **{name: value for name, value in style.items() if value is not None},
        "model": model,
        "revision": revision,
        **approximations,
        "software": f"text2img {__version__}",
    }
