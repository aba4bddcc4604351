"""The flow where an image has the name already: kept, replaced, or the failure of its one prompt."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from tests.painter import Bench, Painter
from text2img.databases import NewPrompt, Selection
from text2img.engine import GeneratedImage
from text2img.errors import ErrorCode
from text2img.evaluation import Evaluator
from text2img.prompts import Evaluation, PromptId, RequestedParameters

FIVE = RequestedParameters(num_inference_steps=5, guidance_scale=1, width=64, height=64)


@pytest.fixture
def bench(tmp_path):
    """Three prompts: 0, 1 and 2."""
    made = Bench(tmp_path, 3)
    yield made
    made.database.close()


def _rows(bench):
    with closing(sqlite3.connect(bench.file)) as database:
        database.row_factory = sqlite3.Row
        return {row["_id"]: dict(row) for row in database.execute("SELECT * FROM datasets")}


def _stored(bench):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in bench.folder.iterdir()}


def _forget(bench, *names):
    """Let the database forget what became of its prompts, as one that was restored does."""
    fields = ", ".join(f"{name} = NULL" for name in names)
    with closing(sqlite3.connect(bench.file)) as rows, rows:
        rows.execute(f"UPDATE datasets SET status = 'pending' {',' if fields else ''} {fields}")  # noqa: S608


class Shaded(Painter):
    """A painter on another GPU: its pixels differ a little."""

    def _paint(self, request):
        shade = request.parameters.seed % 251 + 100
        return GeneratedImage(pixels=np.full((64, 64, 3), shade, np.uint8), scheduler="none")


class Brightness(Evaluator):
    """An evaluator whose score is the image's brightness."""

    name = "brightness"

    def check(self):
        pass

    def evaluate(self, pixels, prompt):
        return Evaluation(evaluator=self.name, score=float(pixels[0, 0, 0]) / 255)


def test_an_image_of_the_same_parameters_is_kept_and_recorded_as_it_is(bench):
    """A worker died after its upload: the next one, on another GPU, keeps the image, and records its hash and
    its score, not those of the image that it drew itself and did not store.
    """
    bench.work(Painter())
    before = _stored(bench)
    _forget(bench, "sha256", "image_url")
    bench.evaluator = Brightness()
    bench.work(Shaded())
    assert bench.counts == (0, 0, 3, 0)
    assert _stored(bench) == before
    rows = _rows(bench)
    assert [rows[n]["sha256"] for n in range(3)] == [before[f"{n}.png"] for n in range(3)]
    assert [round(rows[n]["score"] * 255) for n in range(3)] == [0, 1, 2]


def test_a_recorded_image_is_replaced(bench):
    """The owner wants other images: those that the database recorded give way."""
    bench.work(Painter())
    before = _stored(bench)
    _forget(bench)
    bench.work(Shaded(), requested=(FIVE,))
    assert bench.counts == (0, 0, 3, 0)
    after = _stored(bench)
    assert all(after[name] != before[name] for name in before)
    assert [_rows(bench)[n]["sha256"] for n in range(3)] == [after[f"{n}.png"] for n in range(3)]


def test_an_image_that_was_not_recorded_is_its_prompts_failure(bench):
    """Another database's image, or a file of any other content, stays; the other prompts are made."""
    bench.folder.mkdir()
    (bench.folder / "0.png").write_bytes(b"family")
    Image.new("RGB", (64, 64)).save(bench.folder / "2.png")
    before = _stored(bench)
    bench.work(Painter())
    assert bench.counts == (0, 0, 1, 2)
    assert {name: _stored(bench)[name] for name in before} == before
    failed = [row for row in _rows(bench).values() if row["status"] == "error"]
    assert {row["error_code"] for row in failed} == {ErrorCode.STORAGE_REJECTED.value}
    assert all("not one that this database recorded" in row["error"] for row in failed)


def test_a_change_of_the_recorded_file_protects_it(bench):
    """A user edited one image in place: it is not what was recorded any more, and stays."""
    bench.work(Painter())
    Image.new("RGB", (64, 64), "red").save(bench.folder / "1.png")
    edited = _stored(bench)["1.png"]
    _forget(bench)
    bench.work(Shaded(), requested=(FIVE,))
    assert bench.counts == (0, 0, 2, 1)
    assert _stored(bench)["1.png"] == edited


def test_each_image_of_a_prompt_is_replaced_by_its_own_hash(bench):
    """Three images, then one, then three others: none of them is foreign to its prompt."""

    def want(number, seed):
        new = NewPrompt(
            id=PromptId("int", "1"),
            text="a cat",
            requested=RequestedParameters(seed=seed, num_images=number),
        )
        assert bench.database.runs.requeue_changed([new]) == 1
        bench.work(Painter())

    for number, seed in ((3, 20), (1, 30), (3, 40)):
        want(number, seed)
        assert bench.database.runs.counts(Selection()).error == 0
    assert [bench.shade(name) for name in ("1", "1~1", "1~2")] == [40, 41, 42]


def test_one_foreign_image_of_several_fails_the_prompt(bench):
    """The second of three names belongs to another program: it stays, and the prompt fails as a whole."""
    bench.folder.mkdir()
    (bench.folder / "1~1.png").write_bytes(b"family")
    with closing(sqlite3.connect(bench.file)) as rows, rows:
        rows.execute("UPDATE datasets SET num_images = 3 WHERE _id = 1")
    bench.work(Painter())
    assert bench.counts == (0, 0, 2, 1)
    assert (bench.folder / "1~1.png").read_bytes() == b"family"
