"""What an evaluator saw in a picture, or why it saw nothing. Knows no evaluator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """``score`` in [0, 1]: 1 is all that the prompt asks for; None where the picture could not be judged, and
    ``error`` says why.

    ``matches`` and ``missing`` are short phrases; ``better_prompt`` is a text to try instead, where the
    evaluator has one; ``evaluator`` says who judged.
    """

    evaluator: str
    score: float | None = None
    matches: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    better_prompt: str | None = None
    error: str | None = None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Evaluation:
        """What was recorded, read again; ValueError for what was not."""
        score, phrases = document.get("score"), {n: document.get(n, []) for n in ("matches", "missing")}
        said = {name: document.get(name) for name in ("evaluator", "better_prompt", "error")}
        texts = [
            *phrases["matches"],
            *phrases["missing"],
            *(text for text in said.values() if text is not None),
        ]
        scored = score is None or (isinstance(score, int | float) and 0 <= score <= 1)
        if said["evaluator"] is None or not scored or not all(isinstance(text, str) for text in texts):
            raise ValueError("this is no evaluation")
        told: Any = {**said, **{name: tuple(words) for name, words in phrases.items()}}
        return cls(**told, score=score)

    @property
    def document(self) -> dict[str, object]:
        """What is recorded of it: what it says, and no more."""
        said = {
            "evaluator": self.evaluator,
            "score": self.score,
            "matches": list(self.matches),
            "missing": list(self.missing),
            "better_prompt": self.better_prompt,
            "error": self.error,
        }
        return {name: value for name, value in said.items() if value not in (None, [])}
