"""Three styles that anyone can see in the pixels, to try LoRAs with, and how they are told.

Each shows some of the channels red, green and blue in negative. The demo's colours lie near the corners of
the RGB cube, so that each becomes another one of them, in each style a different one: no picture can pass for
one in another style, nor for one in none. Undone, a style is gone, and the judge of the demo's world sees the
scene. Knows nothing of networks.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageChops

from text2img.demo.judge import judge
from text2img.demo.scenes import COLOURS

if TYPE_CHECKING:
    from text2img.demo.scenes import Scene

PLAIN = "plain"
STYLES: dict[str, tuple[bool, bool, bool]] = {
    "inverted": (True, True, True),
    "red-inverted": (True, False, False),
    "blue-inverted": (False, False, True),
}
"""By style, whether red, green and blue are in negative."""


def lora(style: str) -> Path:
    """The file that teaches the demo model the style."""
    return Path(__file__).parent / f"{style}.safetensors"


def restyle(scene: Scene, style: str) -> Scene:
    """The scene that a picture of this one in the style shows."""
    return replace(scene, colour=_turned(scene.colour, style), background=_turned(scene.background, style))


def undo(style: str, image: Image.Image) -> Image.Image:
    """The picture without the style; and a picture without one in the style."""
    if style == PLAIN:
        return image
    channels = zip(image.convert("RGB").split(), STYLES[style], strict=True)
    return Image.merge(
        "RGB", [ImageChops.invert(channel) if negative else channel for channel, negative in channels]
    )


def tell_style(image: Image.Image, scene: Scene) -> str | None:
    """The style, or ``plain``, in which the picture shows the scene in every attribute; None where in none.

    The scene has to be known: a red circle on white, in negative, is a cyan one on black.
    """
    return next((style for style in (PLAIN, *STYLES) if judge(undo(style, image)).shows(scene)), None)


def _turned(colour: str, style: str) -> str:
    """What a colour's name becomes: that of the corner across the inverted channels."""
    corner = tuple(high != negative for high, negative in zip(_corner(colour), STYLES[style], strict=True))
    return next(name for name in COLOURS if _corner(name) == corner)


def _corner(colour: str) -> tuple[bool, ...]:
    """Whether red, green and blue are high: the corner of the RGB cube next to the colour."""
    return tuple(value > 127 for value in COLOURS[colour])
