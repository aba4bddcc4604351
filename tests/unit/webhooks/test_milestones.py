"""Milestones of progress: each once and in order for any number of steps, pictures and batches."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.outcomes import completed
from text2img.prompts import Claim, Prompt, PromptId, RequestedParameters, request
from text2img.webhooks.progress import MILESTONES, Milestones, milestones_between

URL = "http://backend.example"


def requests(name="a", *, steps=50, pictures=1, url=URL, number=1):
    """The requests of one prompt's pictures, as a worker has them."""
    claim = Claim(PromptId("str", name), "w", number)
    requested = RequestedParameters(
        num_inference_steps=steps, guidance_scale=1, width=64, height=64, num_images=pictures
    )
    first = request(Prompt(claim=claim, text="a cat", webhook_url=url), [requested])
    return [replace(first, number=each) for each in range(pictures)]


class Heard:
    """Milestones, and what they send."""

    def __init__(self):
        self.sent = []
        self.milestones = Milestones(lambda url, name, told: self.sent.append((url, name, list(told))))

    def make(self, batch, steps=None):
        self.milestones.batch(batch)
        for step in range(1, (steps or batch[0].parameters.num_inference_steps) + 1):
            self.milestones.step(step, batch[0].parameters.num_inference_steps)

    def told(self, name="a"):
        return [each for _, told_of, told in self.sent for each in told if told_of == json.dumps(name)]

    def percents(self, name="a"):
        return [each.percent for each in self.told(name)]


@given(of=st.integers(1, 1_000))
def test_each_milestone_comes_once_in_order_at_the_first_step_beyond_it(of):
    """Step by step over any number of steps; what is told at a step is what that step has passed."""
    told = [(percent, now) for now in range(of + 1) for percent in milestones_between(now - 1, now, of)]
    assert [percent for percent, _ in told] == list(MILESTONES)
    for percent, step in told:
        assert step * 100 >= percent * of
        assert step == 0 or (step - 1) * 100 < percent * of


@given(of=st.integers(1, 300), steps=st.lists(st.integers(0, 300), max_size=20))
def test_no_way_through_the_steps_tells_a_milestone_twice(of, steps):
    """Also where steps are passed over, as a batch drawn in parts may do."""
    path = [-1, *sorted({min(step, of) for step in steps}), of]
    told = [
        percent for before, now in itertools.pairwise(path) for percent in milestones_between(before, now, of)
    ]
    assert told == list(MILESTONES)


@pytest.mark.parametrize(
    ("steps", "at"),
    [(1, [0, 1, 1, 1, 1]), (3, [0, 1, 2, 3, 3]), (7, [0, 2, 4, 6, 7]), (50, [0, 13, 25, 38, 45])],
)
def test_the_step_told_is_the_one_at_which_it_was_reached(steps, at):
    """With few steps several milestones fall on one, and all of them are told."""
    heard = Heard()
    heard.make(requests(steps=steps))
    assert [(each.percent, each.step, each.total_steps) for each in heard.told()] == [
        (percent, step, steps) for percent, step in zip(MILESTONES, at, strict=True)
    ]
    assert {url for url, _, _ in heard.sent} == {URL}


@given(pictures=st.integers(1, 7), size=st.integers(1, 4), steps=st.integers(1, 9))
def test_progress_is_over_all_of_a_prompts_pictures(pictures, size, steps):
    """However its pictures are spread over batches, each milestone comes once, in order."""
    heard, waiting = Heard(), requests(pictures=pictures, steps=steps)
    for first in range(0, pictures, size):
        heard.make(waiting[first : first + size])
    assert heard.percents() == list(MILESTONES)
    assert {each.total_steps for each in heard.told()} == {pictures * steps}
    assert [each.step for each in heard.told()] == sorted(each.step for each in heard.told())


def test_a_batch_of_several_prompts_tells_each_of_its_own():
    """Those without a webhook are told to nobody."""
    heard = Heard()
    heard.make([*requests("a"), *requests("b", url="http://other.example"), *requests("c", url=None)])
    assert heard.percents("a") == heard.percents("b") == list(MILESTONES)
    assert heard.percents("c") == []
    assert {url for url, name, _ in heard.sent if name == '"b"'} == {"http://other.example"}


def test_another_try_begins_anew():
    """A prompt that is claimed again after its batch broke off is told from 0 % on, once more each."""
    heard = Heard()
    heard.make(requests(), steps=20)
    heard.make(requests(number=2))
    assert heard.percents() == [0, 25, *MILESTONES]


def test_the_estimate_comes_from_the_steps_that_were_measured():
    """Nothing is known before the first step of the first batch; then it shrinks to nothing. The next batch
    of that shape and size begins with it, one of another does not.
    """
    heard = Heard()
    heard.make(requests("a"))
    heard.make(requests("b"))
    heard.make(requests("c", steps=49))
    first, *later = (each.seconds_left for each in heard.told("a"))
    assert first == 0
    assert all(left > 0 for left in later[:-1])
    assert later == sorted(later, reverse=True)
    assert heard.told("b")[0].seconds_left > 0
    assert heard.told("c")[0].seconds_left == 0


@pytest.mark.parametrize("unit", [1, 3, 40])
def test_an_engine_that_counts_otherwise_is_understood(unit):
    """As one that counts pictures, and says so again and again while none is added: the milestones are those
    of the prompt's steps, each once.
    """
    heard = Heard()
    heard.milestones.batch(requests(steps=20))
    for done in range(unit + 1):
        for _ in range(3):
            heard.milestones.step(done, unit)
    assert heard.percents() == list(MILESTONES)
    assert {each.total_steps for each in heard.told()} == {20}


def test_what_is_recorded_is_remembered_no_more():
    """A worker that goes on for ever does not collect the prompts that it has made."""
    heard = Heard()
    for number in range(30):
        (made,) = requests(str(number))
        heard.make([made])
        heard.milestones.recorded([completed(made)])
    assert heard.milestones._earlier == {}


def test_memory_is_bounded_where_nothing_is_ever_recorded():
    """Claims that were lost are forgotten in the end."""
    heard = Heard()
    for number in range(1_200):
        heard.milestones.batch(requests(str(number), steps=1))
    assert len(heard.milestones._earlier) <= 1_000
