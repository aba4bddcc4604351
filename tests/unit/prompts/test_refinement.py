"""The loop's decisions: what is drawn next, when it is enough, and which picture is the result."""

from __future__ import annotations

from dataclasses import replace

import bson
import pytest

from tests.outcomes import completed
from text2img.databases.records import documents_of
from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts import (
    AwaitsScore,
    Claim,
    Completed,
    Evaluation,
    Failed,
    NeedsRefinement,
    Prompt,
    PromptId,
    RequestedParameters,
    RetryLater,
    request,
)
from text2img.prompts.ids import IterationFolderName
from text2img.prompts.refinement import Loop, fall_back_to_best, refined
from text2img.worker.finish import ImageGroups

WISHES = RequestedParameters(num_inference_steps=1, guidance_scale=1, width=64, height=64, seed=7)
PROMPT = Prompt(claim=Claim(PromptId("int", "1"), "w", 1), text="a cat")
FAILED = Failed(prompt=PROMPT, code=ErrorCode.SAFETY, message="flagged", attempts=1)
LATER = RetryLater(prompt=PROMPT, code=ErrorCode.GENERATION_FAILED, message="no", attempts=1, wait=2)


def asked(prompt, loop, **wished):
    """The requests of the prompt's next iteration."""
    return loop.next(request(prompt, [replace(WISHES, **wished)])).per_image()


def after(prompt, loop, *scores, **said):
    """What the prompt's next iteration comes to where its candidates get these scores."""
    seen = [Evaluation(evaluator="e", score=score, **said) for score in scores]
    return settled(prompt, loop, *([each] for each in seen))


def settled(prompt, loop, *became):
    """What comes of the candidates: each an outcome, or the evaluations that make one."""
    albums = ImageGroups(loop)
    outcome = None
    for one, given in zip(asked(prompt, loop), became, strict=True):
        made = given
        if isinstance(given, list):
            done = completed(one, f"u{one.number}", evaluations=given)
            (image,) = done.images
            image = replace(image, text=one.text, iteration=one.iteration)
            made = replace(done, text=one.original_text, images=(image,))
        outcome = albums.add(one, made)
    return outcome


def resumed(outcome):
    """The prompt as the next claim finds it."""
    return replace(PROMPT, tries=outcome.tries, next_prompt=outcome.next_prompt)


def test_every_try_has_a_seed_and_a_number_of_its_own():
    """Candidates count on where those of the iteration before ended, and are told apart in its folder."""
    loop = Loop(iterations=3, candidates=2)
    first = asked(PROMPT, loop)
    assert [(one.iteration, one.number, one.parameters.seed) for one in first] == [(1, 0, 7), (1, 1, 8)]
    second = asked(resumed(after(PROMPT, loop, 0.1, 0.2)), loop)
    assert [(one.iteration, one.number, one.parameters.seed) for one in second] == [(2, 2, 9), (2, 3, 10)]
    names = [IterationFolderName().name_of(one) for one in (*first, *second)]
    assert names == [
        f"results/1/{name}"
        for name in ("iteration_1", "iteration_1_image_2", "iteration_2", "iteration_2_image_2")
    ]


def test_the_largest_seed_is_followed_by_the_smallest():
    """No try has a seed that a device could not take."""
    seeds = [one.parameters.seed for one in asked(PROMPT, Loop(candidates=3), seed=2**63 - 2)]
    assert seeds == [2**63 - 2, 2**63 - 1, 0]


def test_it_goes_on_until_one_is_good_enough():
    """Below the score there is another iteration; at it the best picture is the result, and all are kept."""
    loop = Loop(iterations=5, candidates=2, min_score=0.8)
    once = after(PROMPT, loop, 0.5, 0.75, better_prompt="a tabby cat")
    assert isinstance(once, NeedsRefinement)
    assert (once.iterations, once.images_made, once.next_prompt) == (1, 2, "a tabby cat")
    twice = after(resumed(once), loop, 0.8, 0.1)
    assert isinstance(twice, Completed)
    assert (twice.iterations, twice.images_made, len(twice.tries)) == (2, 2, 4)
    assert [one.image_url for one in twice.images] == ["u2"]
    assert (twice.text, twice.first.text) == ("a cat", "a tabby cat")


def test_the_last_iteration_ends_with_the_best_of_all():
    """However bad: the best picture of any iteration is the result, of equals the first."""
    loop = Loop(iterations=2, min_score=0.8)
    done = after(resumed(after(PROMPT, loop, 0.6)), loop, 0.6)
    assert (done.iterations, done.first.image_url, done.first.score) == (2, "u0", 0.6)


def test_an_evaluator_that_says_nothing_ends_the_loop():
    """Pictures without a score are kept, and none is drawn of which nobody could say if it is better."""
    mute = [Evaluation(evaluator="e", error="away")]
    done = settled(PROMPT, Loop(iterations=3, candidates=2), mute, mute)
    assert isinstance(done, Completed)
    assert (done.first.score, done.iterations) == (None, 1)
    half = settled(PROMPT, Loop(iterations=1, candidates=2), mute, [Evaluation(evaluator="e", score=0.0)])
    assert half.first.image_url == "u1"


def test_a_candidate_that_failed_leaves_it_to_the_others():
    """One failure of several candidates is none of the prompt's; of all candidates it is."""
    loop = Loop(candidates=2)
    good = [Evaluation(evaluator="e", score=0.5)]
    assert settled(PROMPT, loop, FAILED, good).first.image_url == "u1"
    assert settled(PROMPT, loop, LATER, FAILED) == FAILED
    assert settled(PROMPT, loop, good, None) is None


def test_a_seed_that_failed_is_not_drawn_again():
    """The next iteration has fresh seeds, also where the last candidate of the one before failed; and as
    many as before where there are fewer candidates now.
    """
    loop = Loop(iterations=3, candidates=2)
    once = settled(PROMPT, loop, [Evaluation(evaluator="e", score=0.5)], FAILED)
    assert [one.parameters.seed for one in asked(resumed(once), loop)] == [9, 10]
    twice = after(resumed(after(PROMPT, loop, 0.1, 0.2)), loop, 0.1, 0.2)
    assert [one.number for one in asked(resumed(twice), Loop(iterations=3))] == [4]


def test_a_failure_after_good_iterations_keeps_their_best():
    """A prompt that fails for good in its second iteration is completed with the first one's picture."""
    prompt = resumed(after(PROMPT, Loop(iterations=3), 0.5))
    kept = fall_back_to_best(replace(FAILED, prompt=prompt))
    assert (kept.first.image_url, kept.text, kept.iterations) == ("u0", "a cat", 2)
    assert fall_back_to_best(replace(LATER, prompt=prompt)) == replace(LATER, prompt=prompt)
    assert fall_back_to_best(FAILED) == FAILED


def test_tries_of_another_text_count_no_more():
    """A prompt whose owner has changed it meanwhile begins anew, also where it fails."""
    changed = replace(resumed(after(PROMPT, Loop(iterations=3), 0.5)), text="a dog")
    (one,) = asked(changed, Loop(iterations=3))
    assert (one.text, one.iteration, one.number) == ("a dog", 1, 0)
    failed = replace(FAILED, prompt=changed)
    assert fall_back_to_best(failed) is failed


def test_tries_fit_in_one_document():
    """Where all tries with their long texts would outgrow what MongoDB keeps, the loop ends with the best."""
    loop, prompt, rounds = Loop(iterations=20), PROMPT, 0
    while isinstance(outcome := after(prompt, loop, 0.5, better_prompt="語" * 20_000), NeedsRefinement):
        prompt, rounds = resumed(outcome), rounds + 1
        assert len(bson.encode({"tries": documents_of(outcome.tries, None)})) < 12_000_000
    assert isinstance(outcome, Completed)
    assert rounds > 5


def test_a_next_prompt_that_cannot_be_drawn_is_not():
    """Whoever wrote it into the document: the owner's text is drawn instead."""
    prompt = replace(resumed(after(PROMPT, Loop(iterations=3), 0.5)), next_prompt="\0")
    (one,) = asked(prompt, Loop(iterations=3))
    assert (one.text, one.iteration) == ("a cat", 2)


def test_several_pictures_and_a_loop_exclude_each_other():
    """The loop keeps one picture: a prompt that wants three is told so, and loses nothing."""
    with pytest.raises(PromptFailed, match="num_images is 3") as told:
        asked(PROMPT, Loop(), num_images=3)
    assert told.value.code is ErrorCode.INVALID_PARAMETERS


@pytest.mark.parametrize(
    ("said", "drawn"),
    [
        ({"better_prompt": "a tabby cat", "missing": ("stripes",)}, "a tabby cat"),
        ({"better_prompt": " "}, "a cat"),
        ({"better_prompt": "\ud800"}, "a cat"),
        ({"missing": ("Stripes", "a Cat")}, "a cat, Stripes"),
        ({}, "a cat"),
    ],
)
def test_how_a_prompt_is_refined(said, drawn):
    """The evaluator's proposal where it can be drawn; else what was missed, named again; else fresh seeds."""
    (one,) = asked(PROMPT, Loop())
    (image,) = completed(one, evaluations=[Evaluation(evaluator="e", score=0.1, **said)]).images
    assert refined("a cat", image) == drawn


def test_a_candidate_that_waits_for_its_score_holds_back_the_iteration():
    """The images of all candidates are kept, scored or not; one that failed is left out. The next claim asks
    for the same images again, in the same iteration.
    """
    loop = Loop(iterations=2, candidates=3)
    (image,) = completed(asked(PROMPT, loop)[0]).images
    waiting = AwaitsScore(prompt=PROMPT, text="a cat", images=(image,))
    held = settled(PROMPT, loop, waiting, FAILED, [Evaluation(evaluator="e", score=1.0)])
    assert isinstance(held, AwaitsScore)
    assert [(image.number, image.score) for image in held.images] == [(0, None), (2, 1.0)]
    again = asked(replace(PROMPT, unscored=held.images), loop)
    assert [(each.iteration, each.number) for each in again] == [(1, 0), (1, 1), (1, 2)]
