"""Evaluates the demo model's pictures: the judge looks at the pixels, so a score here is a fact.

Reads a prompt more freely than the demo model does (any order of words, ``big`` for ``large``), and suggests
the sentence that the model was taught: also where that was drawn already and came out wrong, since it means
another thing with another seed.
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

_OTHER_WORDS: Final = {
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
    """Implements ``text2img.evaluation.Evaluator``; its promises stand there."""

    name = "demo"

    def check(self) -> None:
        """Nothing can be wrong."""

    def load(self) -> None:
        """Nothing has to be loaded."""

    def evaluate(self, pixels: NDArray[np.uint8], text: str) -> Evaluation:
        """The share of the scene's four attributes that the picture shows; see Evaluator."""
        from PIL import Image

        from text2img.demo.judge import judge

        scene = read(text)
        wrong = judge(Image.fromarray(pixels)).differences(scene)
        phrases = {name: f"{name} {getattr(scene, name)}" for name in _ATTRIBUTES}
        return Evaluation(
            score=1 - len(wrong) / len(_ATTRIBUTES),
            evaluator=self.name,
            matches=tuple(phrase for name, phrase in phrases.items() if name not in wrong),
            missing=tuple(phrases[name] for name in wrong),
            better_prompt=scene.caption if wrong or text != scene.caption else None,
        )


def read(text: str) -> Scene:
    """The scene that a text means; a size that it does not name is large.

    Raises EvaluationFailed for a text that names no shape, or not two colours.
    """
    words = [_OTHER_WORDS.get(word, word) for word in re.findall(r"[a-z]+", text.lower())]
    sizes, colours, shapes = ([word for word in words if word in known] for known in (SIZES, COLOURS, SHAPES))
    if len(colours) != 2 or len(shapes) != 1 or colours[0] == colours[1]:
        raise EvaluationFailed("the demo's evaluator reads a shape, its colour and its background's, no more")
    return Scene(sizes[0] if sizes else "large", colours[0], shapes[0], colours[1])
