"""The search for the fastest batch size, by cases worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.prompts.test_batching import a_request
from text2img.prompts.batching import Batcher, BatchSize, BatchSizeSearch, FastestSize


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("1", (1, False)),
        (" 10 ", (10, False)),
        ("auto", (64, True)),
        ("auto:12", (12, True)),
        ("Auto:1", (1, True)),
    ],
)
def test_what_is_a_batch_size(text, meant):
    """A number, ``auto``, or ``auto`` with a cap."""
    size = BatchSize.parse(text)
    assert (size.max_size, size.auto) == meant


@pytest.mark.parametrize(
    "text", ["0", "-3", "", "ten", "auto:", "auto:0", "auto:x", "1.5", "fast:3", "3:auto", "²"]
)
def test_what_is_none(text):
    """Anything else is refused."""
    with pytest.raises(ValueError, match="not a batch size"):
        BatchSize.parse(text)


def _search(seconds, most=64, batches=100):
    """The sizes that are tried when a batch of n takes ``seconds(n)``, and the one that wins."""
    trial, tried = BatchSizeSearch(most), []
    for _ in range(batches):
        size = trial.size
        tried.append(size)
        trial.observe(size, seconds(size))
    return tried, trial.size


def test_where_size_costs_nothing_the_largest_wins():
    """Each batch takes a second, whatever its size: 1, 2, 4, 8 images a second, up to the cap."""
    tried, won = _search(lambda _: 1.0, most=8)
    assert tried[:5] == [1, 2, 4, 8, 8]
    assert won == 8


def test_a_cap_that_is_no_power_of_two_is_tried_too():
    """After 8 comes 12, not 16."""
    tried, won = _search(lambda _: 1.0, most=12)
    assert tried[:6] == [1, 2, 4, 8, 12, 12]
    assert won == 12


def test_where_size_gains_nothing_one_is_enough():
    """A second an image at every size: 2 is tried twice, and then nothing more."""
    tried, won = _search(float)
    assert tried[:4] == [1, 2, 2, 1]
    assert (won, set(tried[3:])) == (1, {1})


def test_a_plateau_ends_the_search():
    """1 s up to 4, then in proportion: 1, 2, 4, 4 images a second; 8 is tried twice and gains nothing."""
    tried, won = _search(lambda size: max(1.0, size / 4))
    assert tried[:5] == [1, 2, 4, 8, 8]
    assert 16 not in tried
    assert won in {4, 8}


def test_what_does_not_fit_loses():
    """16 does not fit and is drawn in halves, at a loss: 8 wins."""
    tried, won = _search(lambda size: 1.0 if size <= 8 else 3.0)
    assert tried[:6] == [1, 2, 4, 8, 16, 16]
    assert won == 8


def test_one_slow_batch_does_not_end_the_search():
    """The first batch of 4 takes 10 s instead of one, for reasons of its own; the second shows what 4 can."""
    trial = BatchSizeSearch(8)
    for size, seconds in [(1, 1.0), (2, 1.0), (4, 10.0), (4, 1.0)]:
        assert trial.size == size
        trial.observe(size, seconds)
    assert trial.size == 8


def test_a_slow_first_batch_is_no_reason_to_stay_at_one():
    """What is made once, in the first batch, makes 1 look slow, which does no harm."""
    trial = BatchSizeSearch(4)
    for size, seconds in [(1, 30.0), (2, 1.0), (4, 1.0)]:
        assert trial.size == size
        trial.observe(size, seconds)
    assert trial.size == 4


def test_batches_of_other_sizes_say_nothing():
    """Those that were made before the size was raised, or that were not full, are passed over."""
    trial = BatchSizeSearch(8)
    trial.observe(1, 1.0)
    trial.observe(1, 0.001)
    trial.observe(3, 0.001)
    assert trial.size == 2


@given(st.lists(st.tuples(st.integers(1, 70), st.floats(0, 1e6)), max_size=60), st.integers(1, 64))
def test_the_size_never_leaves_its_bounds(told, most):
    """Whatever it is told."""
    trial = BatchSizeSearch(most)
    for size, seconds in told:
        trial.observe(size, seconds)
        assert 1 <= trial.size <= most


def test_each_kind_has_a_trial_of_its_own():
    """A large picture's batches say nothing of a small one's; guidance and seeds make no kind."""
    sizes = FastestSize(8)
    sizes.generated(a_request(1, width=512), 1, 1.0)
    assert (sizes.of(a_request(2, width=512)), sizes.of(a_request(3, width=1024))) == (2, 1)
    assert sizes.usual == 2


def test_the_usual_size_is_that_of_what_won():
    """What was tried in vain no longer counts: as many are claimed and written down at once as are made."""
    sizes = FastestSize(8)
    for size in (1, 2, 2):
        sizes.generated(a_request(1), size, float(size))
    assert sizes.usual == 1


def test_many_kinds_take_little_memory():
    """A thousand kinds: the oldest are forgotten, and would be tried anew."""
    sizes = FastestSize(8)
    for width in range(64, 8064, 8):
        sizes.generated(a_request(1, width=width), 1, 1.0)
    assert len(sizes._searches) <= 256


def test_batches_follow_the_size():
    """The batcher asks before each batch."""
    sizes = FastestSize(8)
    batcher = Batcher(sizes)
    batcher.add(a_request(number) for number in range(7))
    taken = []
    while batch := batcher.take():
        taken.append(len(batch))
        sizes.generated(batch[0], len(batch), 1.0)
    assert taken == [1, 2, 4]
