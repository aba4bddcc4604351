"""Weights that wait beside a GPU: less of its memory is held, and all of it is given back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.conftest import ask, draw, open_engine
from tests.engine.test_demo_model import MODEL
from text2img.engine.devices import free_caches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def measured(**options):
    """The picture, and the most bytes that the device held for it."""
    free_caches()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    engine = open_engine(MODEL, device="cuda", dtype="fp32", **options)
    (image,) = draw(engine, ask(width=128, height=128))
    peak = torch.cuda.max_memory_allocated() - before
    engine.close()
    return image.pixels.astype(int), peak


def test_peak_memory_falls():
    """A part at a time takes less than the whole model, a layer at a time still less; the picture is the
    same but for rounding.
    """
    whole, most = measured()
    parts, less = measured(offload="model")
    layers, least = measured(offload="sequential")
    assert most > less > least
    assert np.abs(parts - whole).max() <= 1
    assert np.abs(layers - whole).max() <= 1


@pytest.mark.parametrize("how", ["none", "model", "sequential"])
def test_nothing_is_left(how):
    """After ``close`` the device holds what it held before the engine was opened."""
    measured()  # what the libraries keep for themselves, once
    before = torch.cuda.memory_allocated()
    measured(offload=how)
    free_caches()
    assert torch.cuda.memory_allocated() <= before + 2**16


def test_only_while_drawing():
    """Between batches no weights lie on the device."""
    free_caches()
    before = torch.cuda.memory_allocated()
    engine = open_engine(MODEL, device="cuda", offload="model")
    draw(engine, ask(width=128, height=128))
    assert torch.cuda.memory_allocated() < before + 2**20  # the texts' embeddings; the model has 7 MB
