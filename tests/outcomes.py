"""Outcomes for tests that need no device: a prompt that is completed, by what they want to see of it."""

from __future__ import annotations

from dataclasses import replace

from text2img.prompts import (
    Completed,
    Evaluation,
    NeedsRefinement,
    Prompt,
    RequestedParameters,
    StoredImage,
    request,
)

DEFAULTS = RequestedParameters(num_inference_steps=20, guidance_scale=7.5, width=512, height=512)


def completed(of, image_url=None, *, image_urls=(), evaluations=(), **more):
    """The prompt (or request) with its picture at ``image_url``, or several at ``image_urls``.

    ``more``: their ``sha256`` and ``truncated``, and what else was used.
    """
    asked = request(of, [DEFAULTS]) if isinstance(of, Prompt) else of
    urls = image_urls or [image_url or f"gs://b/{asked.prompt.id.name}.png"]
    hashed, cut = more.pop("sha256", "ab" * 32), more.pop("truncated", False)
    made = {**asked.parameters.recorded, "scheduler": "euler", "model": "m", **more}
    pictures = tuple(
        StoredImage(
            image_url=url,
            sha256=hashed,
            text=asked.text,
            used=made,
            number=asked.number + place,
            truncated=cut,
            evaluation=evaluations[place] if evaluations else None,
        )
        for place, url in enumerate(urls)
    )
    return Completed(prompt=asked.prompt, text=asked.text, images=pictures)


def iterated(prompt, score=0.5, words="$a boat, red"):
    """The prompt after one more iteration of one try."""
    seen = Evaluation(
        evaluator="demo", score=score, matches=("a boat",), missing=("red",), better_prompt=words
    )
    number = len(prompt.tries)
    (image,) = completed(prompt, f"gs://b/{number}.png", evaluations=[seen]).images
    image = replace(image, number=number, iteration=number + 1)
    return NeedsRefinement(
        prompt=prompt,
        text="a boat",
        tries=(*prompt.tries, image),
        iterations=number + 1,
        next_prompt=words,
    )
