"""Signatures and formats through a real run of the demo model: who signs, where, as what kind of file."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from tests.acceptance import product
from text2img.demo.judge import judge
from text2img.demo.scenes import Scene
from text2img.images import read_parameters

CAPTION = "a large red circle on a white background"
JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
QUICK = ("--num-inference-steps", "10", "--guidance-scale", "3", "--batch-size", "4")
HOUSE = ("--artist-name", "Studio 9", "--image-format", "webp")
PROMPTS = [
    {"id": "house"},
    {"id": "unsigned", "artist_name": "", "image_format": "png"},
    {"id": "signed", "artist_name": "Ana Díaz", "image_format": "png"},
    {"id": "left", "artist_name": "Ελένη", "signature_position": "bottom-left", "signature_opacity": 255,
     "image_format": "jpeg", "image_quality": 90},
    {"id": "undrawable", "artist_name": "北斎"},
    {"id": "endless", "artist_name": "W" * 100},
]  # fmt: skip


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The folder after a run over all the prompts, of one caption and seed, and the finished process."""
    folder = tmp_path_factory.mktemp("style")
    (folder / "prompts.json").write_text(json.dumps([{"text": CAPTION, "seed": 7, **one} for one in PROMPTS]))
    added = product.run("enqueue", *JOB[:2], "prompts.json", folder=folder)
    assert added.returncode == 0, added.stderr
    return folder, product.sleeping.run(*JOB, *QUICK, *HOUSE, folder=folder)


def _rows(folder):
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        database.row_factory = sqlite3.Row
        return {row["_id"]: dict(row) for row in database.execute("SELECT * FROM datasets")}


def _pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), int)


def test_what_cannot_be_signed_fails_alone(outcome):
    """Two names that cannot be drawn are two errors with a sentence; the other four pictures are made."""
    folder, finished = outcome
    assert finished.returncode == 3, finished.stderr
    assert finished.stdout.startswith("completed 4, failed 2, remaining 0")
    rows = _rows(folder)
    for name, words in (("undrawable", "北 (U+5317)"), ("endless", "too long for an image of 128×128")):
        assert (rows[name]["status"], rows[name]["error_code"]) == ("error", "invalid_parameters")
        assert words in rows[name]["error"]
        assert rows[name]["deaths"] in {None, 0}


def test_files_are_what_was_asked_for(outcome):
    """Names end as the formats do, each file is of its format and shows its caption, whoever signed it."""
    folder, _ = outcome
    kinds = {"house.webp": "WEBP", "unsigned.png": "PNG", "signed.png": "PNG", "left.jpg": "JPEG"}
    assert {path.name for path in (folder / "pictures").iterdir()} == set(kinds)
    rows, scene = _rows(folder), Scene.parse(CAPTION)
    for name, kind in kinds.items():
        with Image.open(folder / "pictures" / name) as image:
            assert image.format == kind
            seen = judge(image)
        assert (seen.colour, seen.background) == (scene.colour, scene.background)
        assert rows[name.partition(".")[0]]["image_url"].endswith(f"/pictures/{name}")


def test_signatures_stand_where_they_were_asked_for(outcome):
    """Beside the unsigned picture of the same seed, only the right corner of each of the others differs."""
    folder, _ = outcome
    plain = _pixels(folder / "pictures" / "unsigned.png")
    for name, side, least in (("signed.png", slice(48, 128), 100), ("house.webp", slice(48, 128), 100)):
        differ = np.abs(_pixels(folder / "pictures" / name) - plain).max(axis=2)
        assert differ[104:, side].max() > least
        differ[104:, side] = 0
        assert differ.max() <= 1  # what the same noise may differ by within a batch
    jpeg = _pixels(folder / "pictures" / "left.jpg")
    assert (jpeg[104:, :80].max(axis=2) < 40).any()  # letters that are quite black
    assert np.abs(jpeg - plain)[:96].mean() < 4


def test_the_style_is_written_down(outcome):
    """What was asked for, by whomever, stands in ``used``, in the result and in the file, and no more."""
    folder, _ = outcome
    style = {
        "house.webp": {"artist_name": "Studio 9", "image_format": "webp"},
        "unsigned.png": {"image_format": "png"},
        "signed.png": {"artist_name": "Ana Díaz", "image_format": "png"},
        "left.jpg": {key: value for key, value in PROMPTS[3].items() if key != "id"},
    }
    rows = _rows(folder)
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        database.row_factory = sqlite3.Row
        results = {row["dataset_id"]: dict(row) for row in database.execute("SELECT * FROM dataset_records")}
    names = set().union(*style.values())
    for file, expected in style.items():
        name = file.partition(".")[0]
        read = read_parameters((folder / "pictures" / file).read_bytes())
        assert (read["prompt"], read["seed"]) == (CAPTION, 7)
        for told in (read, json.loads(rows[name]["used"]), results[name]):
            assert {key: told[key] for key in names if told.get(key) is not None} == expected


def test_a_run_that_could_sign_nothing_does_not_begin(tmp_path):
    """A job-wide name that the font lacks ends the run with status 2 in one line, and nothing is claimed."""
    (tmp_path / "prompts.txt").write_text(CAPTION)
    product.run("enqueue", *JOB[:2], "prompts.txt", folder=tmp_path)
    finished = product.run(*JOB, *QUICK, "--artist-name", "北斎", folder=tmp_path)
    assert finished.returncode == 2, finished.stderr
    said = json.loads(product.errors(finished)[-1])["message"]
    assert said.startswith("the run's own signature cannot be drawn: artist_name has 北 (U+5317), ")
    (row,) = _rows(tmp_path).values()
    assert (row["status"], row["claim_number"]) == ("pending", None)
    tried = product.run(*JOB, *QUICK, "--artist-name", "北斎", "--dry-run", folder=tmp_path)
    assert (tried.returncode, json.loads(product.errors(tried)[-1])["message"]) == (2, said)
