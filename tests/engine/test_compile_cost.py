"""Whether compiling pays, by figures worked out by hand."""

from __future__ import annotations

import pytest

from text2img.engine.compile_policy import CAUTIOUS, BatchTimings, Decision, Estimate, StepTiming


@pytest.mark.parametrize(
    ("prompts", "seconds", "gain", "cost", "pays"),
    [
        (601, 1.0, 0.2, 120, True),  # 120.2 s saved for 120
        (600, 1.0, 0.2, 120, False),  # 120 for 120: nothing gained
        (100, 10.0, 0.5, 499, True),
        (100, 10.0, 0.5, 501, False),
        (1_000_000, 1.0, 0.0, 1, False),  # what brings nothing never pays
        (1_000_000, 1.0, -0.1, 0, False),
        (0, 1.0, 0.5, 0, False),
    ],
)
def test_break_even(prompts, seconds, gain, cost, pays):
    """It pays when prompts times seconds times gain is more than it costs."""
    decision = Decision(prompts, seconds, Estimate(gain=gain, cost=cost))
    assert decision.pays is pays


def test_the_figures_are_told():
    """A decision says the figures it was made by."""
    decision = Decision(1500, 0.8, Estimate(gain=0.25, cost=90))
    assert str(decision) == (
        "compiling pays: 1500 prompts of this shape remain at 0.80 s each; 25% of that is 300 s, and"
        " compiling takes 90 s"
    )
    assert str(Decision(1, 0.8, CAUTIOUS)).startswith("compiling does not pay: 1 prompts")


@pytest.mark.parametrize(("gain", "cost"), [(float("nan"), 1), (1.0, 1), (0.1, -1), (0.1, float("inf"))])
def test_no_estimate(gain, cost):
    """What cannot have been measured is no estimate."""
    with pytest.raises(ValueError, match="invalid estimate"):
        Estimate(gain=gain, cost=cost)


def test_step_timing():
    """The first batch warms up; the others' mean counts, each by its steps."""
    timing = StepTiming()
    timing.add(100, 1000.0)
    assert (timing.counted, timing.seconds_per_step) == (0, None)
    timing.add(100, 10.0)
    timing.add(300, 50.0)
    assert (timing.counted, timing.seconds_per_step) == (2, 60 / 400)


def test_remaining():
    """Of the prompts that are left the same share will be of a shape as of those that came."""
    timings = BatchTimings()
    for shape, prompts in (("wide", 30), ("tall", 10)):
        timings.add_seen(shape, prompts)
    for seconds in (99.0, 40.0):
        timings.add_timing("wide", 10, 20, seconds, compiled=False)
    assert timings.remaining("wide", 10, total=200, steps=50) == (150, 40 / (10 * 20) * 50)
    assert timings.remaining("wide", 5, total=200, steps=50) is None  # batches of five were not seen
    assert timings.remaining("tall", 10, total=200, steps=50) is None


def test_gain():
    """The first compiled batch that is counted tells the gain, once."""
    timings = BatchTimings()
    for seconds in (99.0, 40.0):
        assert timings.add_timing("wide", 10, 20, seconds, compiled=False) is None
    assert timings.add_timing("wide", 10, 20, 99.0, compiled=True) is None
    assert timings.add_timing("wide", 10, 20, 30.0, compiled=True) == pytest.approx(0.25)
    assert timings.add_timing("wide", 10, 20, 30.0, compiled=True) is None


def test_gain_unknown():
    """Without anything to compare with there is no gain."""
    timings = BatchTimings()
    assert [timings.add_timing("wide", 10, 20, 1.0, compiled=True) for _ in range(3)] == [None] * 3
