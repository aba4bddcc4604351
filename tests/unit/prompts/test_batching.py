"""What shares a batch, and that nobody waits for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from text2img.prompts import Claim, Parameters, Prompt, PromptId, Request
from text2img.prompts.batching import Batcher, FixedSize


def a_request(number: int, *, width: int = 512, deaths: int = 0, chunks: int = 1) -> Request:
    claim = Claim(PromptId("int", str(number)), "worker", 1)
    parameters = Parameters(
        negative_prompt=f"not {number}",
        seed=number,
        num_inference_steps=20,
        guidance_scale=7.5,
        width=width,
        height=512,
        scheduler=None,
    )
    prompt = Prompt(claim=claim, text="a cat", deaths=deaths)
    return Request(prompt=prompt, text="a cat", parameters=parameters, chunks=chunks)


def test_seeds_and_negative_prompts_may_differ_within_a_batch() -> None:
    """Prompts that differ in nothing but seed, text and negative prompt go together."""
    batcher = Batcher(FixedSize(4))
    batcher.add(a_request(number) for number in range(4))
    assert len(batcher.take()) == 4


def test_sizes_and_chunks_may_not() -> None:
    """Another size or another number of chunks needs a batch of its own."""
    batcher = Batcher(FixedSize(4))
    batcher.add([a_request(1), a_request(2, width=640), a_request(3, chunks=2)])
    assert [len(batcher.take()) for _ in range(4)] == [1, 1, 1, 0]


def test_full_batches_go_first() -> None:
    """An odd one out does not keep the device half empty while a full batch is there."""
    batcher = Batcher(FixedSize(2))
    batcher.add([a_request(1, width=640), a_request(2), a_request(3)])
    assert [request.parameters.seed for request in batcher.take()] == [2, 3]


def test_nobody_is_overtaken_for_ever() -> None:
    """An odd one out goes after a few batches, though full ones keep coming."""
    batcher = Batcher(FixedSize(2), max_overtakes=4)
    batcher.add([a_request(0, width=640)])
    for turn in range(1, 6):
        batcher.add([a_request(2 * turn), a_request(2 * turn + 1)])
        if any(request.parameters.seed == 0 for request in batcher.take()):
            assert turn == 5
            return
    raise AssertionError("the odd one out is still waiting")


def test_who_killed_two_workers_goes_alone() -> None:
    """A prompt with two deaths takes no neighbour with it."""
    batcher = Batcher(FixedSize(4))
    batcher.add([a_request(1), a_request(2, deaths=2), a_request(3), a_request(4, deaths=2)])
    sizes = sorted(len(batcher.take()) for _ in range(3))
    assert sizes == [1, 1, 2]


def test_who_killed_the_fewest_workers_goes_first() -> None:
    """Prompts that have to run alone wait behind all others, the more the more deaths they have, but not for
    ever: a server's next prompts overtake them four times at most.
    """
    batcher = Batcher(FixedSize(1))
    batcher.add([a_request(1, deaths=4), a_request(2, deaths=2), a_request(3), a_request(4, deaths=1)])
    assert [batcher.take()[0].parameters.seed for _ in range(4)] == [3, 4, 2, 1]
    batcher = Batcher(FixedSize(1), max_overtakes=4)
    batcher.add([a_request(0, deaths=4)])
    turns = []
    for number in range(1, 7):
        batcher.add([a_request(number)])
        turns.append(batcher.take()[0].parameters.seed)
    assert turns == [1, 2, 3, 4, 0, 5]


@given(
    st.lists(st.tuples(st.sampled_from([64, 128, 256]), st.integers(1, 2)), max_size=60), st.integers(1, 7)
)
def test_every_request_goes_exactly_once(shapes: list[tuple[int, int]], size: int) -> None:
    """Whatever comes in whatever order: all leave once, in batches of one shape and no more than ``size``."""
    batcher = Batcher(FixedSize(size))
    batcher.add(a_request(n, width=width, chunks=chunks) for n, (width, chunks) in enumerate(shapes))
    seen: list[int] = []
    while batch := batcher.take():
        assert len({request.shape for request in batch}) == 1
        assert len(batch) <= size
        seen += [request.parameters.seed for request in batch]
    assert sorted(seen) == list(range(len(shapes)))
