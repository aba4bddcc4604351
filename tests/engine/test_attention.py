"""Attention runs as one fused operation, on every family; on which kernel, tests/gpu shows."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engine.conftest import ask, draw, pipe_of

aten = torch.ops.aten
FUSED = aten._scaled_dot_product_flash_attention_for_cpu.default
BY_HAND = {aten._softmax.default, aten._safe_softmax.default, aten.softmax.int}


class Operations(TorchDispatchMode):
    """Lists what is computed."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_fused(loaded, family):
    """The denoiser's attention is torch's fused one and never a softmax between two products."""
    engine = loaded(family)
    denoiser = getattr(pipe_of(engine), "unet", None) or pipe_of(engine).transformer
    operations = Operations()
    hooks = [
        denoiser.register_forward_pre_hook(lambda *_: operations.__enter__() and None),
        denoiser.register_forward_hook(lambda *_: operations.__exit__(None, None, None)),
    ]
    try:
        draw(engine, ask())
    finally:
        for hook in hooks:
            hook.remove()
    assert operations.seen.count(FUSED) >= 2  # once a step at the least
    assert not BY_HAND & set(operations.seen)
