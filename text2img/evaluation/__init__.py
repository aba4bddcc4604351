"""Evaluators: the protocol for scoring how well an image shows what its prompt asks for.

``clip`` scores the similarity of image and text with a local CLIP model. ``gemini`` asks a vision model
behind Google's API what the image shows, what is missing, and for a better prompt. ``demo`` recognizes the
demo's shapes and colours from the pixels. Evaluators know nothing of databases, storage or the worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from text2img.prompts import Evaluation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Evaluation", "Evaluator"]


class Evaluator(Protocol):
    """An evaluator of images. Safe to use from several threads once it is loaded."""

    @property
    def name(self) -> str:
        """The evaluator's name, with its model if it has one: ``gemini:gemini-2.5-flash``."""
        ...

    def check(self) -> None:
        """Check everything that can be checked before a run; raise ConfigurationError or ModelFailed."""
        ...

    def try_call(self) -> None:
        """Send one real request to a service, for ``doctor``; raise EvaluatorFailed or EvaluationFailed."""
        ...

    def load(self) -> None:
        """Load the evaluator, which may take seconds; raise ModelFailed. A second call does nothing."""
        ...

    def evaluate(self, pixels: NDArray[np.uint8], text: str) -> Evaluation:
        """Score how well an image, uint8 (height, width, 3) RGB, shows the text.

        Raises EvaluationFailed if this image cannot be evaluated, or not now (``retryable``), and
        EvaluatorFailed if no image can be.
        """
        ...
