"""The evaluator: looks at a finished picture and says how well it shows what its prompt asks for.

One Protocol; its implementations know pictures and texts, and nothing of databases, storage or the flow.

``clip`` asks a local CLIP model how near the picture lies to the text; ``gemini`` a vision model behind
Google's API what is there, what is missing, and for a better prompt; ``demo`` tells the demo's shapes and
colours by their pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from text2img.prompts.outcomes import Evaluation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Evaluation", "Evaluator"]


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
