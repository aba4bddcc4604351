"""A run that is over, for tests that need neither model nor device: real documents, real pictures."""

from __future__ import annotations

import io
from contextlib import closing
from datetime import UTC, datetime, timedelta

import numpy as np
from PIL import Image

from tests.outcomes import completed
from text2img.databases import Collections, NewPrompt, Run, Selection, open_database
from text2img.prompts import PromptId, RequestedParameters
from text2img.storage import open_storage

BEGAN = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)


def finished_run(url, place, run_id, prompts, **used):
    """Let the database have completed ``prompts`` (id → text and seed) and their run, and the place their
    pictures, 64 × 64: a grey that is the seed's, with a black square for ``run_id`` "b".
    """
    storage = open_storage(place)
    with closing(open_database(url, Collections())) as database:
        new = [
            NewPrompt(id=PromptId("str", name), text=text, requested=RequestedParameters(seed=seed))
            for name, (text, seed) in prompts.items()
        ]
        database.runs.enqueue(new)
        outcomes = []
        for prompt in database.queue.claim("w", len(new), 60, Selection()):
            file = image(prompts[prompt.id.text][1], marked=run_id == "b")
            put = storage.put(f"{prompt.id.name}.png", file, "image/png", lambda: True)
            outcomes.append(completed(prompt, put, **used))
        assert len(database.queue.record(outcomes, run_id, notify=False)) == len(new)
        ended = {"finished_at": BEGAN + timedelta(seconds=9), "status": "completed", "images": len(new)}
        run = Run(id=run_id, started_at=BEGAN, host="h", images_per_second=2.0, **ended)
        database.runs.save_run(run, 60)


def image(level, *, marked=False):
    """A PNG of one grey, with or without a black square."""
    pixels = np.full((64, 64, 3), level, np.uint8)
    if marked:
        pixels[20:40, 20:40] = 0
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
