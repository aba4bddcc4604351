"""The demo's trained model, where it is there: it must draw the colours it is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import text2img
from tests.engine.conftest import ask, draw, open_engine

MODEL = Path(text2img.__file__).parent / "demo" / "model"


@pytest.mark.skipif(not (MODEL / "model_index.json").is_file(), reason="the demo model is not trained yet")
def test_demo_model_draws():
    """The demo's model passes every check and draws 128 × 128 pictures with a colour to them."""
    engine = open_engine(MODEL)
    card = engine.inspect()
    assert (card.family, card.width, card.height) == ("sd", 128, 128)
    requests = [
        ask(
            seed,
            "a red circle on a blue background",
            num_inference_steps=20,
            guidance_scale=3.0,
            width=128,
            height=128,
        )
        for seed in range(2)
    ]
    for picture in draw(engine, *requests):
        middle, corner = picture.pixels[56:72, 56:72].mean((0, 1)), picture.pixels[:8, :8].mean((0, 1))
        assert np.abs(middle - corner).max() > 40
