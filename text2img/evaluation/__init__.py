"""The evaluator: looks at a finished picture and says how well it shows what its prompt asks for.

One Protocol; its implementations know pictures and texts, and nothing of databases, storage or the flow.

    clip    a local CLIP model: how near the picture lies to the text
    gemini  a vision model behind Google's API: what is there, what is missing, a better prompt
    demo    the demo's judge: tells shapes and colours by their pixels
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KINDS = ("none", "clip", "gemini", "demo")
"""What ``--evaluator`` knows; ``clip`` and ``gemini`` may be followed by ``:`` and a model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluator saw. ``score`` in [0, 1]: 1 is all that the prompt asks for.

    ``matches`` and ``missing`` are short phrases; ``better_prompt`` is a text to try instead, where the
    evaluator has one; ``evaluator`` says who judged.
    """

    score: float
    evaluator: str
    matches: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    better_prompt: str | None = None


class Evaluator(Protocol):
    """Judges pictures. Safe to use from several threads once it is loaded."""

    @property
    def name(self) -> str:
        """Who judges, with the model where there is one: ``gemini:gemini-2.5-flash``."""
        ...

    def check(self) -> None:
        """Find out all that can be known before there is work; raises ConfigurationError or ModelFailed."""
        ...

    def load(self) -> None:
        """Get ready to judge, which may take seconds; raises ModelFailed. A second call does nothing."""
        ...

    def evaluate(self, pixels: NDArray[np.uint8], text: str) -> Evaluation:
        """How well a picture, uint8 (height, width, 3) RGB, shows the text.

        Raises EvaluationFailed where this picture cannot be judged; the picture is none the worse for it.
        """
        ...
