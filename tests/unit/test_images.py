"""Pixels → PNG with its parameters."""

from __future__ import annotations

import io
import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from text2img.images import encode_png

PIXELS = np.random.default_rng(7).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def test_pixels_come_back_exactly() -> None:
    """The file holds the very pixels, 40 wide and 24 high."""
    with Image.open(io.BytesIO(encode_png(PIXELS, {}))) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (40, 24))
        assert (np.asarray(picture) == PIXELS).all()


def test_the_same_picture_is_the_same_bytes() -> None:
    """Encoding is deterministic: a repeated upload can be compared by its checksum."""
    assert encode_png(PIXELS, {"seed": 1}) == encode_png(PIXELS.copy(), {"seed": 1})


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=200))
def test_any_prompt_survives_in_the_file(text: str) -> None:
    """Whatever text a prompt may be, the file gives it back letter by letter."""
    with Image.open(io.BytesIO(encode_png(PIXELS, {"prompt": text}))) as picture:
        assert json.loads(picture.text["parameters"]) == {"prompt": text}
