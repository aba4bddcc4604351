"""Every pipeline that a tiny model can be built for: what is asked for is what is drawn.

Ten of them in ``make test-all``, all in ``make test-models``. The others of the table would need a text
encoder of billions of weights or of a kind that no configuration here makes (ChatGLM for Kolors, Llama for
HiDream, Mistral for FLUX.2, image encoders for Kandinsky 2).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.engine.conftest import ask, draw, look, pipe_of
from tests.engine.pipeline_table import TRIED
from tests.engine.test_pipelines import called, owned
from text2img.engine.pipelines import CALLS
from text2img.errors import PromptFailed

USUAL = {"sd1", "sdxl", "sd3", "flux", "qwen", "z-image", "sana", "klein", "chroma", "lcm"}
"""Those that ``make test-all`` runs."""
PIPELINES = [
    pytest.param(name, family, id=family, marks=[] if family in USUAL else pytest.mark.models)
    for name, family in TRIED.items()
]


class HaltedError(Exception):
    """What a stopped run raises at a step."""


def difference(one, other) -> int:
    return int(np.abs(one.pixels.astype(int) - other.pixels.astype(int)).max())


@pytest.mark.parametrize(("name", "family"), PIPELINES)
def test_matrix(loaded, tiny, name, family):
    """Guidance, negative prompt, steps, size and seed are used as asked; the record is the call."""
    engine, call = loaded(family), CALLS[name]
    info = engine.inspect()
    assert type(pipe_of(engine)).__name__ == name
    assert look(tiny(family)).requested.num_inference_steps is not None
    guided = ask(guidance_scale=3.0, negative_prompt="dogs")

    # Guidance and negative prompt change the image, or are left out.
    (plain,), calls = called(engine, guided)
    (stronger,) = draw(engine, dataclasses.replace(guided, parameters=_with(guided, guidance_scale=9.0)))
    assert bool(difference(plain, stronger)) is info.guidance
    (other,) = draw(engine, ask(guidance_scale=3.0, negative_prompt="zebras"))
    used = engine.prepare(guided).parameters
    assert bool(difference(plain, other)) is bool(used.negative_prompt)
    if not used.negative_prompt:
        with pytest.raises(PromptFailed, match="negative_prompt has no effect"):
            engine.prepare(owned(ask(guidance_scale=3.0), negative_prompt="dogs"))

    # The record is the call.
    assert len(calls) == 1
    passed = calls[0]
    assert (passed["num_inference_steps"], passed["width"], passed["height"]) == (2, 64, 64)
    assert passed.get(call.guidance_name) == used.guidance_scale

    # Another seed and more steps are other images; the same request is the same one.
    assert difference(plain, *draw(engine, guided)) == 0
    for change in ({"seed": 1}, {"num_inference_steps": 3}):
        (changed,) = draw(engine, dataclasses.replace(guided, parameters=_with(guided, **change)))
        assert difference(plain, changed) > 0

    # Alone and in a batch, with and without negative prompts, up to a level.
    batch = [ask(seed, guidance_scale=3.0, negative_prompt="dogs" * (seed % 2)) for seed in range(3)]
    for request, image in zip(batch, draw(engine, *batch), strict=True):
        assert difference(image, *draw(engine, request)) <= 1

    # Sizes.
    wide = 64 + info.multiple * max(1, 32 // info.multiple)
    (image,) = draw(engine, ask(width=wide))
    assert image.pixels.shape == (64, wide, 3)
    with pytest.raises(PromptFailed, match="must be a multiple of"):
        engine.prepare(ask(width=64 + info.multiple // 2))

    # A stop at a step ends the call, and leaves the engine usable.
    def halt(done, _of):
        if done:
            raise HaltedError

    with pytest.raises(HaltedError):
        draw(engine, guided, on_step=halt)
    assert difference(plain, *draw(engine, guided)) == 0


def _with(request, **changed):
    return dataclasses.replace(request.parameters, **changed)
