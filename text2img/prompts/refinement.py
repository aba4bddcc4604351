"""The refinement loop: generate a prompt's images, evaluate them, and repeat until one is good enough.

An iteration is one claim. Its state is stored in the prompt's document, so that any worker may continue with
the next iteration, in batches with other prompts. This module only decides; it generates nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts import AwaitsScore, Completed, Failed, NeedsRefinement, RetryLater, best_of
from text2img.prompts.parameters import check_prompt_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from text2img.prompts import Outcome, Prompt, Request, StoredImage

MAX_ITERATIONS: Final = 20
MAX_CANDIDATES: Final = 16
_MAX_TRIES_CHARS: Final = 1_500_000
"""Characters of all tries together, beyond which the loop ends: the tries are stored in one document."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """At most ``iterations`` iterations of ``candidates`` images each, until one scores ``min_score``."""

    iterations: int = 1
    candidates: int = 1
    min_score: float = 1.0

    def next(self, request: Request) -> Request:
        """Return the request for the first candidate of the prompt's next iteration.

        ``request`` is for the prompt as its owner wrote it. Raises PromptFailed (``invalid_parameters``) for
        a prompt that requests several images: the loop keeps only the best one.
        """
        if request.parameters.num_images > 1:
            raise PromptFailed(
                ErrorCode.INVALID_PARAMETERS,
                f"num_images is {request.parameters.num_images}, and the loop (--iterations, --candidates,"
                " --min-score) keeps one image of a prompt; remove one of the two",
            )
        tries = _tries(request.prompt, request.text)
        before = tries[-1].iteration if tries else 0
        return replace(
            request,
            text=_valid_or(request.text, request.prompt.next_prompt) if tries else request.text,
            original=request.text,
            iteration=before + 1,
            # A failed candidate is not among the tries, but its seed was used.
            number=max(before * self.candidates, tries[-1].number + 1 if tries else 0),
            num_images=self.candidates,
        )

    def decide(self, request: Request, outcomes: Sequence[Outcome | None]) -> Outcome | None:
        """Return the prompt's outcome after this iteration, given the outcomes of its candidates.

        A failed candidate is ignored if another one succeeded. If no image of this iteration has a score, the
        loop ends. Returns None if the claim is lost.
        """
        if None in outcomes:  # the claim is lost
            return None
        if waiting := awaiting_score(outcomes):
            return waiting
        completed = [outcome for outcome in outcomes if isinstance(outcome, Completed)]
        new = [image for outcome in completed for image in outcome.images]
        if not new:
            return first_failure(outcomes)
        new.sort(key=lambda image: image.number)
        tries = (*_tries(request.prompt, request.original_text), *new)
        best, latest = best_of(tries), best_of(new)
        last = request.iteration >= self.iterations or latest.score is None or _are_too_long(tries)
        if not last and not self._is_good_enough(best):
            return NeedsRefinement(
                prompt=request.prompt,
                text=request.original_text,
                tries=tries,
                iterations=request.iteration,
                next_prompt=refined(request.original_text, latest),
            )
        return Completed(
            prompt=request.prompt,
            text=request.original_text,
            images=(best,),
            tries=tries,
            iterations=request.iteration,
        )

    def _is_good_enough(self, image: StoredImage) -> bool:
        return image.score is not None and image.score >= self.min_score


def awaiting_score(outcomes: Sequence[Outcome | None]) -> AwaitsScore | None:
    """Return the outcome of a prompt of which an image waits for its score; None if no image does."""
    first = next((outcome for outcome in outcomes if isinstance(outcome, AwaitsScore)), None)
    if first is None:
        return None
    stored = [outcome for outcome in outcomes if isinstance(outcome, AwaitsScore | Completed)]
    images = sorted((image for each in stored for image in each.images), key=lambda image: image.number)
    return replace(first, images=tuple(images))


def first_failure(outcomes: Sequence[Outcome | None]) -> Outcome | None:
    """Return the first failure among the outcomes, a permanent one if possible; None if there is none."""
    for kind in (Failed, RetryLater):
        for outcome in outcomes:
            if isinstance(outcome, kind):
                return outcome
    return None


def fall_back_to_best(outcome: Outcome) -> Outcome:
    """Return the outcome; if it is a permanent failure after earlier iterations, complete with their best."""
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
        images=(best_of(tries),),
        tries=tries,
        iterations=tries[-1].iteration + 1,
    )


def refined(text: str, image: StoredImage) -> str:
    """Return the text for the next iteration, given the evaluation of the last one's best image.

    It is the evaluator's proposal if that is valid; else the text with the missing phrases appended; else the
    text itself, with new seeds.
    """
    evaluation = image.evaluation
    if evaluation is None:
        return text
    missing = [phrase for phrase in evaluation.missing if phrase.lower() not in text.lower()]
    with_missing = _valid_or(text, ", ".join([text, *missing]))
    return _valid_or(with_missing, evaluation.better_prompt)


def _valid_or(text: str, proposal: object) -> str:
    """Return the proposal if it is a valid prompt text, else the text."""
    try:
        return check_prompt_text(proposal)
    except PromptFailed:
        return text


def _are_too_long(tries: Sequence[StoredImage]) -> bool:
    """Return True if one more iteration could exceed a MongoDB document: 16 MB, at 4 bytes a character."""
    return sum(len(str((image.text, image.used, image.evaluation))) for image in tries) > _MAX_TRIES_CHARS


def _tries(prompt: Prompt, text: str) -> tuple[StoredImage, ...]:
    """Return the prompt's tries so far; empty if the owner has changed the text since the first one."""
    return prompt.tries if prompt.tries and prompt.tries[0].text == text else ()
