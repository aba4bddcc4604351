"""The evaluator of the demo model's images: the judge measures the pixels, so its scores are exact.

It reads prompts more freely than the demo model does: any order of words, ``big`` for ``large``. It suggests
the caption that the model was trained on, even if that was the prompt and the image came out wrong: with
another seed the same caption gives another image.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from text2img.demo.scenes import COLOURS, SHAPES, SIZES, Scene
from text2img.errors import EvaluationFailed
from text2img.evaluation import Evaluation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SYNONYMS: Final = {
    "big": "large",
    "huge": "large",
    "tiny": "small",
    "little": "small",
    "crimson": "red",
    "golden": "yellow",
    "emerald": "green",
    "turquoise": "cyan",
    "navy": "blue",
    "violet": "purple",
    "disc": "circle",
    "ring": "circle",
    "box": "square",
    "pyramid": "triangle",
}
_ATTRIBUTES: Final = ("size", "colour", "shape", "background")


class DemoEvaluator:
    """An Evaluator of the demo's scenes."""

    name = "demo"

    def check(self) -> None:
        """Do nothing: no configuration can be wrong."""

    def try_call(self) -> None:
        """Do nothing: there is no service."""

    def load(self) -> None:
        """Do nothing: there is no model to load."""

    def evaluate(self, pixels: NDArray[np.uint8], text: str) -> Evaluation:
        """Score the share of the scene's four attributes that the image shows; see Evaluator."""
        from PIL import Image

        from text2img.demo.judge import judge

        scene = parse_scene(text)
        wrong = judge(Image.fromarray(pixels)).differences(scene)
        phrases = {name: f"{name} {getattr(scene, name)}" for name in _ATTRIBUTES}
        return Evaluation(
            score=1 - len(wrong) / len(_ATTRIBUTES),
            evaluator=self.name,
            matches=tuple(phrase for name, phrase in phrases.items() if name not in wrong),
            missing=tuple(phrases[name] for name in wrong),
            better_prompt=scene.caption if wrong or text != scene.caption else None,
        )


def parse_scene(text: str) -> Scene:
    """Return the scene that a text describes; the default size is large.

    Raises EvaluationFailed unless the text names one shape and two different colours.
    """
    words = [_SYNONYMS.get(word, word) for word in re.findall(r"[a-z]+", text.lower())]
    sizes, colours, shapes = ([word for word in words if word in known] for known in (SIZES, COLOURS, SHAPES))
    if len(colours) != 2 or len(shapes) != 1 or colours[0] == colours[1]:
        raise EvaluationFailed(
            "the demo's evaluator needs one shape, its colour, and another colour for the background"
        )
    return Scene(sizes[0] if sizes else "large", colours[0], shapes[0], colours[1])
