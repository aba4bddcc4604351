"""How prompts become embeddings, chunk by chunk."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.engine.conftest import ask, draw, open_engine, pipe_of
from text2img.engine.loading import check_tokenizers
from text2img.engine.text_encoding import ChunkedText, TensorLRUCache, WholeText

LONG = "the quick brown fox, " * 20  # 340 letters, each a token


def same(one, other):
    return torch.equal(one, other)


@pytest.mark.parametrize("text", ["a cat", "", "(a+) ++cat-- [x] (y:1.3)", "a" * 75])
def test_short_sd(loaded, text):
    """A text of one window has, bit by bit, the embeddings of the pipeline's own encode_prompt."""
    pipe = pipe_of(loaded("sd1"))
    with torch.no_grad():
        theirs, negative = pipe.encode_prompt(text, "cpu", 1, True, "blurry")
    ours = ChunkedText(pipe).encode([text], ["blurry"], 1)
    assert same(ours["prompt_embeds"], theirs)
    assert same(ours["negative_prompt_embeds"], negative)
    assert set(ours) == {"prompt_embeds", "negative_prompt_embeds"}


@pytest.mark.parametrize("negative", ["blurry", ""])
def test_short_sdxl(loaded, negative):
    """The same with XL's two encoders and pooled text; no negative prompt is zeros, as XL was trained."""
    pipe = pipe_of(loaded("sdxl"))
    with torch.no_grad():
        theirs = pipe.encode_prompt("a cat", device="cpu", negative_prompt=negative or None)
    ours = ChunkedText(pipe).encode(["a cat"], [negative], 1)
    names = [
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ]
    for name, expected in zip(names, theirs, strict=True):
        assert same(ours[name], expected), name
    assert bool(ours["negative_prompt_embeds"].any()) == bool(negative)


def test_neighbours_do_not_matter(loaded):
    """A text's embeddings are bit by bit the same alone and beside others."""
    text = ChunkedText(pipe_of(loaded("sdxl")))
    alone = text.encode(["a cat"], ["x"], 1)
    beside = text.encode(["dogs", "a cat", "a"], ["", "x", "y"], 1)
    for name, rows in alone.items():
        assert same(rows[0], beside[name][1]), name


@pytest.mark.parametrize(("letters", "chunks"), [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_count(loaded, letters, chunks):
    """A text fills a window for each 75 tokens; the longer of prompt and negative prompt counts."""
    engine = loaded("sd1")
    assert engine.prepare(ask(text="a" * letters or " ")).chunks == chunks
    assert engine.prepare(ask(text="a", negative_prompt="a" * letters)).chunks == chunks


def test_long_embeddings(loaded):
    """A long text's windows stand one after another, each read on its own; empty ones fill up."""
    text = ChunkedText(pipe_of(loaded("sd1")))
    both = text.encode(["a " * 75 + "b " * 75], ["x"], 2)
    assert both["prompt_embeds"].shape == both["negative_prompt_embeds"].shape == (1, 154, 32)
    parts = [text.encode([part], None, 1)["prompt_embeds"] for part in ("a " * 75, "b " * 75, "x", "")]
    assert same(both["prompt_embeds"], torch.cat(parts[:2], dim=1))
    assert same(both["negative_prompt_embeds"], torch.cat(parts[2:], dim=1))


def test_long_pooled(loaded):
    """XL's pooled text is that of the first window."""
    text = ChunkedText(pipe_of(loaded("sdxl")))
    both = text.encode(["a " * 75 + "b " * 75], None, 2)
    first = text.encode(["a " * 75], None, 1)
    assert both["prompt_embeds"].shape == (1, 154, 64)
    assert same(both["pooled_prompt_embeds"], first["pooled_prompt_embeds"])


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_end_of_a_long_text_counts(loaded, family):
    """What stands beyond the 77th token changes the picture, and nothing is called truncated."""
    engine = loaded(family)
    one, other = draw(engine, ask(text=LONG + "red"), ask(text=LONG + "blue", seed=0))
    assert (one.pixels != other.pixels).any()
    assert not one.truncated


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_truncated(loaded, family):
    """Where the model's longest reader cannot read it all, the picture says so; what it reads is not cut."""
    engine = loaded(family)
    reads = {"sd3": 256, "flux": 512}[family]
    whole, cut = draw(engine, ask(text="a" * (reads - 10)), ask(text="a" * (reads + 10)))
    assert (whole.truncated, cut.truncated) == (False, True)


def test_weighting_syntax_is_text(loaded):
    """A "+" and parentheses are letters like others: nothing is weighted."""
    readers = ChunkedText(pipe_of(loaded("sd1")))._text_encoders
    assert len(set(readers[0].windows("(cat)++"))) == 1
    assert readers[0].windows("(cat)++") != readers[0].windows("cat")


@pytest.fixture
def forwards(tiny):
    """An engine of the family, and how often each of its text encoders has run."""
    hooks = []

    def counted(family):
        engine, counts = open_engine(tiny(family)), {}
        for name, module in pipe_of(engine).components.items():
            if name.startswith("text_encoder") and module is not None:
                counts[name] = 0

                def count(*_, name=name):
                    counts[name] += 1

                hooks.append(module.register_forward_hook(count))
        return engine, counts

    yield counted
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3"])
def test_equal_texts_are_read_once(forwards, family):
    """Over a run of batches each encoder reads each text once, the negative prompt above all; the pictures
    are, bit by bit, those of an engine that reads them for the first time.
    """
    engine, counts = forwards(family)
    first = [
        ask(seed, text, negative_prompt="blurry") for seed, text in enumerate(["a cat", "dogs", "a cat"])
    ]
    draw(engine, *first)
    assert set(counts.values()) == {3}  # two prompts and a negative one
    again = [ask(7, "birds", negative_prompt="blurry"), ask(8, "dogs", negative_prompt="blurry")]
    remembered = draw(engine, *again)
    assert set(counts.values()) == {4}
    fresh = draw(forwards(family)[0], *again)
    for one, other in zip(remembered, fresh, strict=True):
        assert np.array_equal(one.pixels, other.pixels)


def test_flux_reads_once(forwards):
    """Flux, which takes no negative prompts, reads equal prompts once."""
    engine, counts = forwards("flux")
    draw(engine, ask(0, "a cat"), ask(1, "a cat"))
    draw(engine, ask(2, "a cat"))
    assert set(counts.values()) == {1}


def numbers(rows: int) -> tuple[torch.Tensor]:
    return (torch.zeros(rows, dtype=torch.uint8),)


def test_remembered_within_its_room():
    """Beyond its bytes the least recently used goes, and only what is larger than all is made each time."""
    made = []

    def ask_for(key, rows=40):
        def make():
            made.append(key)
            return numbers(rows)

        return known.get(key, make)

    known = TensorLRUCache(100)
    for key in ("a", "b", "a", "c", "a", "b"):  # c drops b, which was not used for longest; b drops c
        ask_for(key)
    assert made == ["a", "b", "c", "b"]
    assert ask_for("large", 101)[0].nbytes == 101
    ask_for("large", 101)
    assert made[4:] == ["large", "large"]


def test_a_processor_in_place_of_a_tokenizer():
    """Kandinsky 5 has a processor of texts and images as its tokenizer; that one's tokenizer counts."""
    from tests.engine.models import t5_tokenizer

    processor = SimpleNamespace(tokenizer=t5_tokenizer())
    text = WholeText(SimpleNamespace(components={"tokenizer": processor, "tokenizer_2": None}), 8)
    assert text.truncated("a cat that sleeps")
    assert not text.truncated("cat")
    encoder = SimpleNamespace(config=SimpleNamespace(vocab_size=len(processor.tokenizer)))
    check_tokenizers({"tokenizer": processor, "text_encoder": encoder})
