"""A picture's file: what the encoder makes of the same pixels for one wish and another."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from text2img.errors import ConfigurationError, ErrorCode, PromptFailed
from text2img.images import Encoder, parameters, read_parameters
from text2img.prompts import Claim, Prompt, PromptId, Request, RequestedParameters
from text2img.prompts.parameters import check_loras, resolve_parameters

PIXELS = np.random.default_rng(7).integers(0, 256, (72, 128, 3), dtype=np.uint8)
PLAIN = resolve_parameters(
    (RequestedParameters(num_inference_steps=5, guidance_scale=3, width=128, height=72),), seed=1
)
SIGNED = replace(PLAIN, artist_name="Ana Díaz")


def _pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def test_a_picture_that_asks_for_nothing_is_a_png_of_its_pixels() -> None:
    """Without wishes the file is an RGB PNG, 128 wide and 72 high, that holds the very pixels."""
    file = Encoder().encode(PIXELS, PLAIN, {})
    assert (file.ending, file.content_type) == (".png", "image/png")
    with Image.open(io.BytesIO(file.data)) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (128, 72))
    assert (_pixels(file.data) == PIXELS).all()


def test_a_name_alone_signs_in_the_usual_way() -> None:
    """With a name the bottom right corner has changed, at half opacity; the pixels given are left alone."""
    before = PIXELS.copy()
    signed = _pixels(Encoder().encode(PIXELS, SIGNED, {}).data)
    rows, columns = np.nonzero((signed != PIXELS).any(axis=2))
    assert rows.min() > 36
    assert columns.min() > 30
    asked = replace(SIGNED, signature_position="bottom-right", signature_opacity=128)
    assert (signed == _pixels(Encoder().encode(PIXELS, asked, {}).data)).all()
    assert (before == PIXELS).all()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_same_picture_is_the_same_bytes_from_any_thread(kind: str) -> None:
    """Encoding is deterministic, also on many threads at once: repeated uploads are compared by content."""
    encoder, wanted = Encoder(), replace(SIGNED, image_format=kind)
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda _: encoder.encode(PIXELS.copy(), wanted, {"seed": 1}), range(24)))
    assert len({file.data for file in files}) == 1


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_file_names_its_loras_and_none_of_their_secrets(kind: str) -> None:
    """Paths and weights stand in it, without what a signed URL signs with, nowhere in its bytes."""
    signed = {
        "path": "https://ana:pass5ecret@b.example/ink.safetensors?X-Amz-Signature=5ecret",
        "weight": 0.5,
    }
    wanted = replace(PLAIN, image_format=kind, loras=check_loras([signed, {"path": "artist/stripes"}]))
    prompt = Prompt(claim=Claim(PromptId("int", "1"), "w", 1), text="a cat")
    asked = Request(prompt=prompt, text="a cat", parameters=wanted)
    facts = parameters(asked, scheduler="euler", model="m", revision=None, approximations={})
    data = Encoder().encode(PIXELS, wanted, facts).data
    assert read_parameters(data)["loras"] == [
        {"path": "https://b.example/ink.safetensors", "weight": 0.5},
        {"path": "artist/stripes", "weight": 1.0},
    ]
    assert b"5ecret" not in data.replace(b"\0", b"")  # EXIF's text is UTF-16


def test_a_name_that_cannot_be_drawn_is_refused_before_there_is_a_picture() -> None:
    """The check says what encoding would say, from the parameters alone."""
    wanted = replace(SIGNED, artist_name="北斎")
    with pytest.raises(PromptFailed, match=r"北 \(U\+5317\)") as refused:
        Encoder().check(wanted)
    assert refused.value.code is ErrorCode.INVALID_PARAMETERS
    with pytest.raises(PromptFailed):
        Encoder().encode(PIXELS, wanted, {})
    Encoder().check(PLAIN)
    Encoder().check(SIGNED)


def test_a_font_that_is_none_is_found_out_at_once(tmp_path) -> None:
    """A missing file, a folder, a text and an empty file are wrong configuration, each in one line."""
    (tmp_path / "text.ttf").write_text("no font")
    (tmp_path / "empty.ttf").write_bytes(b"")
    for name in ("missing.ttf", ".", "text.ttf", "empty.ttf"):
        with pytest.raises(ConfigurationError, match=r"^the font .* cannot be read: "):
            Encoder(str(tmp_path / name))


def test_the_file_says_how_it_was_signed_and_written_where_somebody_asked() -> None:
    """Style stands in the file's parameters where it was wished for; else they are as they always were."""
    prompt = Prompt(claim=Claim(PromptId("int", "1"), "w", 1), text="a cat")
    wanted = replace(SIGNED, signature_opacity=200, image_format="webp", image_quality=80)
    for asked, more in (
        (PLAIN, {}),
        (
            wanted,
            {
                "artist_name": "Ana Díaz",
                "signature_opacity": 200,
                "image_format": "webp",
                "image_quality": 80,
            },
        ),
    ):
        request = Request(prompt=prompt, text="a cat", parameters=asked)
        facts = parameters(request, scheduler="ddim", model="m", revision=None, approximations={})
        read = read_parameters(Encoder().encode(PIXELS, asked, facts).data)
        assert read == {
            "prompt": "a cat", "negative_prompt": "", "seed": 1, "num_inference_steps": 5,
            "guidance_scale": 3.0, "width": 128, "height": 72, "scheduler": "ddim", "model": "m",
            "revision": None, "software": read["software"], **more,
        }  # fmt: skip
