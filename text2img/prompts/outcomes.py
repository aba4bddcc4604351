"""What becomes of a prompt: pictures that are stored, a failure for good, or another try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from text2img.errors import ErrorCode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from text2img.errors import PromptFailed
    from text2img.prompts import Claim, Prompt


MAX_RETRY_DELAY = 86_400.0
"""Seconds between two tries at the most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredImage:
    """A picture that is stored at ``image_url``, its bytes' hash beside it.

    ``text`` is what was drawn, ``used`` all else that it was made with, by the names it is recorded under;
    ``evaluation`` what an evaluator saw in it. ``number`` says which of its prompt's pictures it is, from 0,
    ``iteration`` in which round it was made, from 1.
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
        """The evaluator's score in [0, 1]; None where there is none."""
        return None if self.evaluation is None else self.evaluation.score


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A prompt whose ``pictures`` are stored, in the order of their numbers: the first of them is the result,
    the others are what a prompt with several gets besides. ``text`` is what the prompt asked for.

    In a loop the result is the best of its ``tries``, which it made in so many ``iterations``.
    """

    prompt: Prompt
    text: str
    pictures: tuple[StoredImage, ...]
    tries: tuple[StoredImage, ...] = ()
    iterations: int = 0

    @property
    def claim(self) -> Claim:
        """The claim under which it was made."""
        return self.prompt.claim

    @property
    def first(self) -> StoredImage:
        """The picture that is the result."""
        return self.pictures[0]

    @property
    def made(self) -> int:
        """How many pictures were made under this claim."""
        return _made(self.tries, self.iterations) if self.tries else len(self.pictures)


@dataclass(frozen=True, slots=True, kw_only=True)
class NeedsRefinement:
    """A prompt whose ``tries`` are not good enough after so many ``iterations``: pending again at once, to be
    drawn as ``next_prompt``. ``text`` is what it asked for.
    """

    prompt: Prompt
    text: str
    tries: tuple[StoredImage, ...]
    iterations: int
    next_prompt: str

    @property
    def claim(self) -> Claim:
        """The claim under which the last of them were made."""
        return self.prompt.claim

    @property
    def first(self) -> StoredImage:
        """The picture that would be the result."""
        return best_of(self.tries)

    @property
    def made(self) -> int:
        """How many pictures were made under this claim."""
        return _made(self.tries, self.iterations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A prompt that failed for good, with a sentence for its owner."""

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
    """A prompt that failed but is worth another try: pending again, not before ``wait`` seconds from now."""

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
    """The try with the highest score, of equals the first; one without a score only where none has any."""
    return max(tries, key=lambda each: -1.0 if each.score is None else each.score)


def _made(tries: Sequence[StoredImage], iteration: int) -> int:
    return sum(each.iteration == iteration for each in tries)


def failure(prompt: Prompt, exc: PromptFailed, max_attempts: int) -> Failed | RetryLater:
    """Failed for good, or to be tried again after a wait that grows: 2, 8, 32 … seconds, at most a day."""
    # Who is abandoned did not fail by itself this time: nobody tried.
    attempts = prompt.attempts + (exc.code is not ErrorCode.ABANDONED)
    if exc.code.retryable and attempts < max_attempts:
        wait = min(2.0 * 4 ** min(attempts - 1, 20), MAX_RETRY_DELAY)
        return RetryLater(prompt=prompt, code=exc.code, message=str(exc), attempts=attempts, wait=wait)
    return Failed(prompt=prompt, code=exc.code, message=str(exc), attempts=attempts)


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
