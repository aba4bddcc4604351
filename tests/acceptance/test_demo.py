"""``demo``: what a newcomer sees first."""

from __future__ import annotations

import pytest
from PIL import Image

from tests.acceptance import product
from tests.acceptance.product import sleeping


@pytest.mark.smoke
def test_the_demo_needs_nothing_and_shows_twelve_pictures(tmp_path):
    """The demo makes 12 right pictures and a contact sheet; again it has nothing to do; afresh it works."""
    misleading = {"MONGO_URI": "mongodb://nowhere", "DEVICE": "cuda", "GCS_BUCKET": "x", "BATCH_SIZE": "0"}
    first = product.run("demo", folder=tmp_path, **misleading)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("completed 12, failed 0, remaining 0")
    assert "12 of 12 images match their prompt" in first.stdout
    with Image.open(tmp_path / "text2img-demo" / "contact-sheet.png") as sheet:
        assert sheet.width > 700
    again = product.run("demo", folder=tmp_path)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert "--fresh" in again.stdout
    fresh = sleeping.run("demo", "--fresh", folder=tmp_path)
    assert fresh.stdout.startswith("completed 12")
