"""The outcomes of a prompt: images that are stored, a permanent failure, a retry, or another iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from text2img.errors import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from text2img.errors import PromptFailed
    from text2img.prompts import Claim, Prompt


MAX_RETRY_DELAY = 86_400.0
"""The maximum delay in seconds between two attempts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """An image that is stored at ``image_url``, with the SHA-256 of its bytes.

    ``text`` is the text it was generated from, ``used`` all other parameters, by the names under which they
    are recorded. ``evaluation`` is an evaluator's assessment. ``number`` is its number within the prompt,
    from 0; ``iteration`` is the iteration that made it, from 1.
    """

    image_url: str
    sha256: str
    text: str
    used: Mapping[str, object]
    number: int = 0
    iteration: int = 1
    truncated: bool = False
    evaluation: Evaluation | None = None

    @property
    def score(self) -> float | None:
        """The evaluator's score in [0, 1]; None if there is none."""
        return None if self.evaluation is None else self.evaluation.score


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A prompt whose images are stored, in the order of their numbers.

    The first image is the result; the others are additional images of a prompt with several. ``text`` is the
    prompt's own text. In a loop, the result is the best of its ``tries``, made in ``iterations`` iterations.
    """

    prompt: Prompt
    text: str
    images: tuple[StoredImage, ...]
    tries: tuple[StoredImage, ...] = ()
    iterations: int = 0

    @property
    def claim(self) -> Claim:
        """The claim under which it was made."""
        return self.prompt.claim

    @property
    def first(self) -> StoredImage:
        """The image that is the result."""
        return self.images[0]

    @property
    def images_made(self) -> int:
        """The number of images made under this claim."""
        return _images_in(self.iterations, self.tries) if self.tries else len(self.images)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedsRefinement:
    """A prompt whose ``tries`` are not good enough after ``iterations`` iterations.

    It is pending again at once; its next iteration uses the text ``next_prompt``. ``text`` is its own text.
    """

    prompt: Prompt
    text: str
    tries: tuple[StoredImage, ...]
    iterations: int
    next_prompt: str

    @property
    def claim(self) -> Claim:
        """The claim under which the last iteration was made."""
        return self.prompt.claim

    @property
    def first(self) -> StoredImage:
        """The image that would be the result."""
        return best_of(self.tries)

    @property
    def images_made(self) -> int:
        """The number of images made under this claim."""
        return _images_in(self.iterations, self.tries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A prompt that failed permanently, with a message for its owner."""

    prompt: Prompt
    code: ErrorCode
    message: str
    attempts: int

    @property
    def claim(self) -> Claim:
        """The claim under which it failed."""
        return self.prompt.claim


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryLater:
    """A prompt that failed but may be retried: pending again, not before ``wait`` seconds from now."""

    prompt: Prompt
    code: ErrorCode
    message: str
    attempts: int
    wait: float

    @property
    def claim(self) -> Claim:
        """The claim under which it failed."""
        return self.prompt.claim


Outcome = Completed | NeedsRefinement | Failed | RetryLater


def best_of(tries: Sequence[StoredImage]) -> StoredImage:
    """Return the try with the highest score, the first among equals; scores come before missing scores."""
    return max(tries, key=lambda image: -1.0 if image.score is None else image.score)


def _images_in(iteration: int, tries: Sequence[StoredImage]) -> int:
    return sum(image.iteration == iteration for image in tries)


def failure(prompt: Prompt, exc: PromptFailed, max_attempts: int) -> Failed | RetryLater:
    """Return a permanent failure, or a retry after a growing delay: 2, 8, 32 … seconds, at most a day."""
    # An abandoned prompt was not attempted this time.
    attempts = prompt.attempts + (exc.code is not ErrorCode.ABANDONED)
    if exc.code.retryable and attempts < max_attempts:
        wait = min(2.0 * 4 ** min(attempts - 1, 20), MAX_RETRY_DELAY)
        return RetryLater(prompt=prompt, code=exc.code, message=str(exc), attempts=attempts, wait=wait)
    return Failed(prompt=prompt, code=exc.code, message=str(exc), attempts=attempts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """An evaluator's assessment of an image.

    ``score`` is in [0, 1], where 1 means all that the prompt asks for; None if the image could not be
    evaluated, for the reason in ``error``. ``matches`` and ``missing`` are short phrases. ``better_prompt``
    is a text to try instead, if the evaluator proposes one. ``evaluator`` is the evaluator's name.
    """

    evaluator: str
    score: float | None = None
    matches: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    better_prompt: str | None = None
    error: str | None = None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation that was recorded as ``document``; raise ValueError if it is malformed."""
        score, phrases = document.get("score"), {n: document.get(n, []) for n in ("matches", "missing")}
        fields = {name: document.get(name) for name in ("evaluator", "better_prompt", "error")}
        texts = [
            *phrases["matches"],
            *phrases["missing"],
            *(text for text in fields.values() if text is not None),
        ]
        valid_score = score is None or (isinstance(score, int | float) and 0 <= score <= 1)
        if fields["evaluator"] is None or not valid_score or not all(isinstance(text, str) for text in texts):
            raise ValueError("not an evaluation")
        values: Any = {**fields, **{name: tuple(words) for name, words in phrases.items()}}
        return cls(**values, score=score)

    @property
    def document(self) -> dict[str, object]:
        """The document to record, without empty fields."""
        fields = {
            "evaluator": self.evaluator,
            "score": self.score,
            "matches": list(self.matches),
            "missing": list(self.missing),
            "better_prompt": self.better_prompt,
            "error": self.error,
        }
        return {name: value for name, value in fields.items() if value not in (None, [])}
