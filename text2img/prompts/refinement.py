"""The loop: draw a prompt, look at the pictures, and draw it again until one is good enough.

An iteration is one claim. What it has come to goes back into the prompt's document, so that any worker may
go on with the next one, in batches with whatever else waits. Knows scores and texts; draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts.outcomes import Completed, Failed, NeedsRefinement, RetryLater, best_of
from text2img.prompts.validation import check_prompt_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from text2img.prompts import Prompt, Request
    from text2img.prompts.outcomes import Outcome, StoredImage

MAX_ITERATIONS: Final = 20
MAX_CANDIDATES: Final = 16
_HEAVIEST: Final = 1_500_000
"""Characters of all tries together, beyond which the iteration is the last: they stand in one document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """At most ``iterations`` rounds of ``candidates`` pictures each, until one scores ``min_score``."""

    iterations: int = 1
    candidates: int = 1
    min_score: float = 1.0

    def next(self, asked: Request) -> Request:
        """The request for the first candidate of the prompt's next iteration; ``asked`` is for the prompt as
        its owner wrote it.

        Raises PromptFailed (``invalid_parameters``) for a prompt that wants several pictures: the loop keeps
        the best one.
        """
        if asked.parameters.num_images > 1:
            raise PromptFailed(
                ErrorCode.INVALID_PARAMETERS,
                f"num_images is {asked.parameters.num_images}, and the loop (--iterations, --candidates,"
                " --min-score) keeps one picture of a prompt; leave one of the two out",
            )
        tries = _tries(asked.prompt, asked.text)
        before = tries[-1].iteration if tries else 0
        return replace(
            asked,
            text=_drawable(asked.prompt.next_prompt, asked.text) if tries else asked.text,
            original=asked.text,
            iteration=before + 1,
            # A candidate that failed is no try, but its seed is not fresh either.
            number=max(before * self.candidates, tries[-1].number + 1 if tries else 0),
            pictures=self.candidates,
        )

    def settle(self, asked: Request, became: Sequence[Outcome | None]) -> Outcome | None:
        """What becomes of the prompt after this iteration, of what its candidates became.

        A candidate that failed leaves it to the others. Where no picture of this iteration has a score, there
        is nothing to go by, and it is the last one.
        """
        if None in became:  # the claim is lost
            return None
        new = [each for one in became if isinstance(one, Completed) for each in one.pictures]
        if not new:
            return first_failure(became)
        new.sort(key=lambda each: each.number)
        tries = (*_tries(asked.prompt, asked.original_text), *new)
        best, latest = best_of(tries), best_of(new)
        last = asked.iteration >= self.iterations or latest.score is None or _fill_a_document(tries)
        if not last and not self._suffices(best):
            return NeedsRefinement(
                prompt=asked.prompt,
                text=asked.original_text,
                tries=tries,
                iterations=asked.iteration,
                next_prompt=refined(asked.original_text, latest),
            )
        return Completed(
            prompt=asked.prompt,
            text=asked.original_text,
            pictures=(best,),
            tries=tries,
            iterations=asked.iteration,
        )

    def _suffices(self, image: StoredImage) -> bool:
        return image.score is not None and image.score >= self.min_score


def first_failure(became: Sequence[Outcome | None]) -> Outcome | None:
    """The failure that is the prompt's, first of all one for good; None where there is none."""
    for kind in (Failed, RetryLater):
        for one in became:
            if isinstance(one, kind):
                return one
    return None


def fall_back_to_best(outcome: Outcome) -> Outcome:
    """The outcome; of a prompt that failed for good after iterations that did not, the best of those."""
    if not isinstance(outcome, Failed) or not outcome.prompt.tries:
        return outcome
    try:
        text = check_prompt_text(outcome.prompt.text, outcome.prompt.prompt_tags)
    except PromptFailed:
        return outcome
    if not (tries := _tries(outcome.prompt, text)):
        return outcome
    return Completed(
        prompt=outcome.prompt,
        text=text,
        pictures=(best_of(tries),),
        tries=tries,
        iterations=tries[-1].iteration + 1,
    )


def refined(text: str, image: StoredImage) -> str:
    """What to draw instead of the text: the evaluator's own proposal, where it has one that can be drawn;
    else the text with what it missed named once more; else the text, which gets fresh seeds.
    """
    seen = image.evaluation
    if seen is None:
        return text
    missing = [phrase for phrase in seen.missing if phrase.lower() not in text.lower()]
    return _drawable(seen.better_prompt, _drawable(", ".join([text, *missing]), text))


def _drawable(proposal: object, text: str) -> str:
    """The proposal; the text where that cannot be drawn."""
    try:
        return check_prompt_text(proposal)
    except PromptFailed:
        return text


def _fill_a_document(tries: Sequence[StoredImage]) -> bool:
    """Whether one more iteration could outgrow a document of MongoDB: 16 MB, at four bytes a character."""
    return sum(len(str((each.text, each.used, each.evaluation))) for each in tries) > _HEAVIEST


def _tries(prompt: Prompt, text: str) -> tuple[StoredImage, ...]:
    """The prompt's tries so far; none where the first was of another text, since its owner has changed it."""
    return prompt.tries if prompt.tries and prompt.tries[0].text == text else ()
