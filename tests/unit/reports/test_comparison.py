"""Two runs side by side: who belongs to whom, what differs, how alike, and how it is shown."""

from __future__ import annotations

import io
import json
import re
import threading
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from text2img.databases import CompletedPrompt, Run
from text2img.errors import EvaluationFailed, ObjectUnreadable
from text2img.prompts import PromptId
from text2img.reports.comparison import (
    MAX_VALUES,
    Comparison,
    Side,
    comparison_stats,
    differences,
    images_of,
    match_images,
)
from text2img.reports.comparison.similarity import image_similarity, in_parallel, measure_pairs, ssim
from text2img.reports.comparison.table import document, page, table

BEGAN = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)


def _made(name, text="a boat", *, scores=(), urls=1, **used):
    return CompletedPrompt(
        id=PromptId("str", name) if isinstance(name, str) else PromptId("int", str(name)),
        text=text,
        dataset_id=None,
        run_id="r",
        image_urls=tuple(f"/pictures/{name}-{number}.png" for number in range(urls)),
        completed_at=BEGAN,
        used={"seed": 7, "num_inference_steps": 10, **used},
        scores=scores,
    )


def _run(run_id="r", **fields):
    return Run(id=run_id, started_at=BEGAN, host="h", status="completed", **fields)


def _side(*made, runs=None, name="A"):
    images = tuple(image for one in made for image in images_of(one))
    return Side(name=name, runs=(_run(),) if runs is None else runs, images=images)


def _compared(a, b, read=None):
    pairs = match_images(a.images, b.images)
    return Comparison(a=a, b=b, pairs=measure_pairs(pairs, read, None) if read else pairs)


def _file(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, kind)
    return file.getvalue()


def _plain(level, size=(64, 64)):
    return np.full((size[1], size[0], 3), level, np.uint8)


NOISE = np.random.default_rng(3).integers(0, 256, (96, 64, 3), dtype=np.uint8)


def _likeness(a, b, clip=None):
    return image_similarity((lambda: a, lambda: b), clip)


def test_pictures_are_matched_by_id_and_else_by_text_and_seed():
    """The id goes first, whatever the text; the rest finds the same text and seed once; the others stay."""
    a = _side(_made("1"), _made("x", "a cat"), _made("y", "a cat"), _made("z", "a dog"), _made("3", seed=8))
    b = _side(_made("1", "another"), _made("u", "a cat"), _made("v", "a dog", seed=9), _made(3))
    found = _compared(a, b)
    assert [(p.a.prompt.text, p.b.prompt.text, p.by_id) for p in found.pairs] == [
        ("1", "1", True),
        ("x", "u", False),
    ]
    assert found.alone == (3, 2)


def test_each_of_several_pictures_meets_its_own():
    """The n-th picture of a prompt meets the n-th, with its own score and seed; a third has no partner."""
    found = _compared(_side(_made("1", urls=3, scores=(0.1, None))), _side(_made("1", urls=2, scores=(0.5,))))
    assert [(p.a.url, p.b.seed, p.a.score, p.b.score) for p in found.pairs] == [
        ("/pictures/1-0.png", 7, 0.1, 0.5),
        ("/pictures/1-1.png", 8, None, None),
    ]
    assert found.alone == (1, 0)


def test_what_differs_is_told_once_with_its_pairs():
    """Parameters, texts and seeds of pairs; host and versions of runs; nothing that is the same."""
    a = _side(_made("1"), _made("2", loras=[{"path": "ink"}]), runs=(_run(versions={"torch": "2.8"}),))
    b = _side(
        *(_made("1", num_inference_steps=20), _made("2", num_inference_steps=30, seed=1)),
        runs=(_run(versions={"torch": "2.9"}),),
    )
    found = {each.name: each for each in differences(a, b, match_images(a.images, b.images))}
    assert found.keys() == {"num_inference_steps", "loras", "seed", "torch version"}
    assert (found["num_inference_steps"].a, found["num_inference_steps"].b) == ((10,), (20, 30))
    assert [found[name].pairs for name in ("num_inference_steps", "loras", "seed")] == [2, 1, 1]
    assert found["loras"].a == ([{"path": "ink"}],)
    assert found["torch version"].b == ("2.9",)


def test_a_loop_is_told_by_what_it_used():
    """A prompt that took three iterations differs in that from one that was drawn once."""
    a, b = _side(_made("1")), _side(replace(_made("1"), iterations=3))
    (found,) = differences(a, b, match_images(a.images, b.images))
    assert (found.name, found.a, found.b, found.pairs) == ("iterations", (None,), (3,), 1)


def test_values_without_end_are_cut():
    """A seed for each prompt makes a list of bounded length and the right number of pairs."""
    several = [(_made(str(n), seed=n), _made(str(n), seed=-n)) for n in range(1, 100)]
    a, b = (_side(*side) for side in zip(*several, strict=True))
    (seeds,) = differences(a, b, match_images(a.images, b.images))
    assert (len(seeds.a), seeds.pairs) == (MAX_VALUES, 99)


def test_speed_is_that_of_all_its_runs():
    """100 pictures at 10/s and 100 at 5/s are 200 in 30 s; seconds add up; nonsense counts as nothing."""
    runs = (
        _run(images=100, images_per_second=10.0, seconds={"denoise": 9.0, "load": "long"}),
        _run(images=100, images_per_second=5.0, seconds={"denoise": 19.0}),
        _run(images=0, images_per_second=7.0),
    )
    side = _side(runs=runs)
    assert side.images_per_second == pytest.approx(200 / 30)
    assert side.seconds == {"denoise": 28.0}
    assert _side(runs=()).images_per_second == 0


def test_ssim_of_plain_pictures_is_the_papers_formula():
    """Without structure only luminance is left: (2ab + C1) / (a² + b² + C1), C1 = (0.01 · 255)²."""
    c1 = (0.01 * 255) ** 2
    for a, b in ((10, 200), (90, 100), (0, 255)):
        found = ssim(Image.fromarray(_plain(a)), Image.fromarray(_plain(b)))
        assert found == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-6)


def test_ssim_falls_as_pictures_part():
    """Equal pictures have 1; more noise, less; red on green is told from green on red of the same grey."""
    drawn = np.tile(np.linspace(0, 255, 64)[None, :, None], (64, 1, 3)).astype(np.uint8)
    noise = np.random.default_rng(1).normal(0, 1, drawn.shape)
    found = [
        ssim(Image.fromarray(drawn), Image.fromarray(np.clip(drawn + level * noise, 0, 255).astype(np.uint8)))
        for level in (0, 5, 20, 80)
    ]
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    red, green = (255, 0, 0), (0, 130, 0)
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, :32], halves[:, 32:] = red, green
    assert ssim(Image.fromarray(halves), Image.fromarray(halves[:, ::-1].copy())) < 0.7


def test_another_size_is_brought_down_and_other_proportions_are_refused():
    """A picture and itself twice as large are nearly the same; one of other proportions has no SSIM."""
    smooth = Image.fromarray(NOISE).resize((16, 24)).resize((256, 384), Image.Resampling.BICUBIC)
    large = _file(smooth.resize((512, 768), Image.Resampling.BICUBIC))
    found = _likeness(large, _file(smooth))
    assert found.ssim > 0.98
    assert found.note == "512×768 and 256×384, resized to 256×384"
    assert _likeness(_file(_plain(1, (64, 64))), _file(_plain(1, (64, 96)))).ssim is None
    assert "proportions" in _likeness(_file(_plain(1, (64, 64))), _file(_plain(1, (64, 96)))).note
    assert "smaller than 11" in _likeness(_file(_plain(1, (8, 8))), _file(_plain(2, (8, 8)))).note


def test_what_cannot_be_compared_says_why():
    """A file that is not there, one that is no picture, a model that fails: a note, and the rest is told."""

    def gone():
        raise ObjectUnreadable("/pictures/1.png cannot be read: it is not there")

    def fails(one, other):
        raise EvaluationFailed("CLIP failed on these pictures: no")

    good = _file(NOISE)
    assert "it is not there" in image_similarity((gone, lambda: good), None).note
    assert "not an image" in _likeness(good, b"?").note
    assert "truncated" in _likeness(good, good[:-400]).note
    found = _likeness(good, _file(NOISE[::-1]), fails)
    assert (found.clip, found.note) == (None, "CLIP failed on these pictures: no")
    assert found.ssim < 0.5
    same = _likeness(good, good, lambda one, other: 0.5)
    assert (same.ssim, same.clip, same.note) == (1.0, 1.0, "the same file")


def test_whoever_stops_asking_leaves_nothing_waiting():
    """Of 1,000 pairs no more are looked at than were begun when the one who asks went away."""
    began, gate = [], threading.Event()

    def look(number):
        began.append(number)
        if number:
            gate.wait()
        return number

    looks = in_parallel(look, range(1000))
    try:
        assert next(looks) == 0
        looks.close()
    finally:
        gate.set()
    assert len(began) < 20


HOSTILE = "a <script>alert(1)</script> \"boat\" & 'more' \x1b[31m\u202e\n\ud800"


def _shown(read=lambda url: _file(NOISE), text=HOSTILE, url=None):
    both = [_made("<i>", text, scores=(score,), model="<b>m</b>") for score in (0.25, 0.75)]
    if url:
        both = [replace(one, image_urls=(url,)) for one in both]
    a, b = _side(both[0], name="<u>A</u>"), _side(both[1], _made("2"), runs=())
    return _compared(a, b, read)


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text, self.values = [], "", {}

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            self.values.setdefault(name, []).append(value)

    def handle_data(self, data):
        self.text += data


def _parsed(comparison, read=lambda url: _file(NOISE)):
    tags = _Tags()
    tags.feed("".join(page(comparison, read, Path("/pages"))))
    return tags


def test_the_page_shows_texts_as_texts():
    """What a prompt, a run and an id hold is text on the page: no element or attribute of theirs."""
    found = _parsed(_shown())
    known = "html head meta title style body h1 table tr th td p div article a figure img figcaption small"
    assert set(found.tags) <= set(known.split())
    assert "a <script>alert(1)</script> \"boat\" & 'more'" in found.text
    assert "<u>A</u>" in found.text
    assert not [name for name in found.values if name.startswith("on")]
    assert "default-src 'none'" in found.values["content"][0]
    assert not any(
        "\x1b" in piece or "\u202e" in piece for piece in page(_shown(), lambda url: b"", Path("/pages"))
    )


def test_the_page_holds_its_pictures_and_links_originals():
    """Pictures are in it, small; links lead to pictures' files, buckets and web pages alone."""
    found = _parsed(_shown())
    assert len(found.values["src"]) == 2
    assert all(source.startswith("data:image/webp;base64,") for source in found.values["src"])
    assert found.values["href"] == ["../pictures/%3Ci%3E-0.png"] * 2
    links = {
        "gs://bucket/a b/7.png": "https://storage.cloud.google.com/bucket/a%20b/7.png",
        "https://h/7.png?a=1&b=2": "https://h/7.png?a=1&b=2",
        "javascript:alert(1)": None,
        "/etc/passwd": None,
    }
    for url, link in links.items():
        assert _parsed(_shown(url=url)).values.get("href", [None])[0] == link
    assert "prefers-color-scheme: dark" in found.text


def test_a_picture_that_is_gone_leaves_its_reason_on_the_page():
    """Instead of a picture stands why there is none."""

    def gone(url):
        raise ObjectUnreadable(f"{url} cannot be read: <gone>")

    found = _parsed(_shown(read=gone), gone)
    assert "cannot be read: <gone>" in found.text
    assert "src" not in found.values


def test_the_table_is_plain_lines():
    """No control character reaches the terminal, and the figures are those of the pairs."""
    said = "\n".join(table(_shown()))
    assert re.fullmatch(r"[^\x00-\x09\x0b-\x1f\x7f\u202e\ud800]*", said)
    assert "A 0.250, B 0.750, means of 1; B is better in 1, worse in 0, equal in 0" in said
    assert "without a partner: 0 of A, 1 of B" in said
    assert "SSIM     mean 1.000" in said
    assert "speed unknown" in said


def test_the_document_says_all_of_it():
    """It is JSON of ASCII, with every pair, figure and difference, whatever the texts hold."""
    said = document(_shown())
    assert said.isascii()
    read = json.loads(said)
    (pair,) = read["pairs"]
    assert (pair["text"], pair["ssim"], pair["matched_by"]) == (HOSTILE, 1.0, "id")
    assert (pair["a"]["score"], pair["b"]["score"]) == (0.25, 0.75)
    assert read["figures"]["better"] == 1
    assert read["b"]["alone"] == 1
    assert read["differences"][-1]["name"] == "host"


def test_nothing_in_common_is_told_and_no_error():
    """Two runs without a common prompt have a table, a page and a document as well."""
    none = _compared(_side(_made("1")), _side(_made("2", "a cat")))
    assert comparison_stats(none).ssim is None
    assert "pairs    0 (by id 0, by text and seed 0); without a partner: 1 of A, 1 of B" in table(none)
    assert json.loads(document(none))["pairs"] == []
    assert "img" not in _parsed(none).tags
