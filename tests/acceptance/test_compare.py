"""``compare`` as its users run it: two runs of the demo's prompts with different steps."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.acceptance import product
from tests.acceptance.product import sleeping
from tests.finished import finished_run

PROMPTS = [
    {"id": "one", "text": "a large red circle on a white background", "seed": 7},
    {"id": "two", "text": "a small blue star on a yellow background", "seed": 8, "num_images": 2},
    {
        "id": "script",
        "text": "a large green square on a black background <script>alert(1)</script>",
        "seed": 3,
    },
]
ALONE = {"id": "alone", "text": "a small red triangle on a white background", "seed": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two folders, each with its database and its pictures: ``few`` steps and ``many``."""
    folder = tmp_path_factory.mktemp("compared")
    for name, steps, prompts in (("few", "2", PROMPTS), ("many", "12", [*PROMPTS, ALONE])):
        (folder / "prompts.json").write_text(json.dumps(prompts))
        finished = sleeping.run(
            *("run", "--output-dir", name, "--run-id", f"run-{name}"),
            *("--model-id", str(product.MODEL), "--num-inference-steps", steps, "--guidance-scale", "3"),
            *("--input-file", "prompts.json", "--evaluator", "demo"),
            folder=folder,
            SLEEP_PER_IMAGE="0.1",
        )
        assert finished.returncode == 0, finished.stderr
    return folder


def test_two_runs_are_compared(folder):
    """The table says what differs, how fast, how good and how alike; JSON and page hold the same pairs."""
    finished = product.run(
        "compare", "few", "many", "--json", "all.json", "--html", "page.html", folder=folder
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    lines = finished.stdout.splitlines()
    assert lines[0].startswith("A        few: 4 images, ")
    assert lines[1].startswith("B        many: 5 images, ")
    assert re.search(r"\d images/s; .*\bdenoise \d+\.\d s", lines[0])
    assert "differs  num_inference_steps: A 2; B 12 (4 pairs)" in lines
    assert sum(line.startswith("differs") for line in lines) == 1
    assert "pairs    4 (by id 4, by text and seed 0); without a partner: 0 of A, 1 of B" in lines
    assert any(line.startswith("score    A ") for line in lines)

    found = json.loads((folder / "all.json").read_text())
    assert [(pair["prompt_id"], pair["a"]["number"]) for pair in found["pairs"]] == [
        *(("one", 0), ("script", 0), ("two", 0), ("two", 1)),
    ]
    assert all(0 < pair["ssim"] < 1 for pair in found["pairs"])
    assert found["figures"]["ssim"]["least"] == min(pair["ssim"] for pair in found["pairs"])
    assert all(pair[side]["score"] is not None for pair in found["pairs"] for side in "ab")
    assert (found["a"]["runs"], found["b"]["runs"]) == (["run-few"], ["run-many"])
    assert found["a"]["images_per_second"] > 0
    assert found["a"]["seconds"]["denoise"] > 0

    page = (folder / "page.html").read_text()
    assert page.count("data:image/webp;base64,") == 8
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    linked = [Path(pair["b"]["image_url"]).relative_to(folder) for pair in found["pairs"]]
    assert all(f'href="./{path}"' in page for path in linked)


def test_runs_by_their_ids(folder):
    """A run is found by its id in the database that the options name, and behind a folder or a URL by ``#``;
    JSON goes to standard output alone. A run compared with itself is the same throughout.
    """
    options = ("--output-dir", "few")
    finished = product.run(
        "compare", "run-few", "sqlite:///few/text2img.db#run-few", "--json", "-", *options, folder=folder
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert [pair["ssim"] for pair in found["pairs"]] == [1.0] * 4
    assert found["differences"] == []
    again = product.run("compare", "run-few", "many#run-many", *options, folder=folder)
    assert "differs  num_inference_steps: A 2; B 12 (4 pairs)" in again.stdout.splitlines()


def test_a_url_that_is_no_pictures_is_not_followed(folder, tmp_path):
    """Of a document that names another file the pair says so; the page neither shows nor links it."""
    (tmp_path / "copy").mkdir()
    with (
        closing(sqlite3.connect(folder / "few" / "text2img.db")) as database,
        closing(sqlite3.connect(tmp_path / "copy" / "text2img.db")) as copy,
        copy,
    ):
        database.backup(copy)
        copy.execute(
            "UPDATE datasets SET image_urls = NULL, image_url = ?", [str(folder / "few" / "text2img.db")]
        )
    finished = product.run("compare", "copy", "copy", "--html", "page.html", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "not compared: '" in finished.stdout
    assert "SSIM     of no pair; 3 not compared" in finished.stdout.splitlines()
    page = (tmp_path / "page.html").read_text()
    assert "data:image" not in page
    assert "href=" not in page


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        (("few", "many#gone"), "there is no run 'gone' in many"),
        (("few", "empty"), "there is no text2img.db in the folder empty"),
        (("few", "none/such"), "'none/such' is not a folder"),
        (("few", "run-many"), "'run-many' is not a folder"),
        (("few",), "RUN_B"),
        (("few", "many", "--html", "no/such/page.html"), "--html no/such/page.html cannot be written"),
    ],
)
def test_what_is_no_run_is_one_line_and_status_2(folder, runs, says):
    """A run that is not there, an empty folder, a file that cannot be written: one line, before any work."""
    (folder / "empty").mkdir(exist_ok=True)
    refused = product.run("compare", *runs, folder=folder)
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = product.errors(refused)
    assert says in line


def test_a_password_in_a_runs_url_is_not_shown(tmp_path):
    """A URL that is wrong is complained of without its password."""
    url = "mongodb://me:s3cret-word@127.0.0.1:port/art"
    refused = product.run("compare", f"{url}#a", f"{url}#b", folder=tmp_path)
    assert refused.returncode == 2
    assert len(product.errors(refused)) == 1
    assert "s3cret-word" not in refused.stdout + refused.stderr


def test_runs_in_mongodb_with_pictures_in_a_bucket(mongodb_server, gcs, tmp_path):
    """Databases by their URLs, pictures from two prefixes of a bucket: prompts with other ids there meet by
    text and seed, and a picture that is gone costs its pair the SSIM and no more.
    """
    from google.cloud import storage

    texts = {"1": ("a boat", 100), "2": ("a cat", 150), "3": ("a dog", 200)}
    urls = [f"{mongodb_server}/compared_{name}" for name in "ab"]
    finished_run(urls[0], f"gs://{gcs.bucket}/compared/a", "a", texts)
    others = {f"other-{name}": said for name, said in texts.items()} | {"lone": ("a bird", 1)}
    finished_run(urls[1], f"gs://{gcs.bucket}/compared/b", "b", others, scheduler="ddim")
    storage.Client().bucket(gcs.bucket).delete_blob("compared/b/other-3.png")
    finished = product.run(
        *("compare", urls[0], f"{urls[1]}#b", "--output", f"gs://{gcs.bucket}/compared", "--json", "-"),
        folder=tmp_path,
        STORAGE_EMULATOR_HOST=gcs.host,
    )
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert {
        (pair["a"]["prompt_id"], pair["b"]["prompt_id"], pair["matched_by"]) for pair in found["pairs"]
    } == {(name, f"other-{name}", "text and seed") for name in "123"}
    alike = {pair["prompt_id"]: pair["ssim"] for pair in found["pairs"]}
    assert 0 < alike["1"] < 1
    assert 0 < alike["2"] < 1
    assert alike["3"] is None
    assert (found["a"]["alone"], found["b"]["alone"], found["a"]["images_per_second"]) == (0, 1, 2.0)
    (difference,) = found["differences"]
    assert (difference["name"], difference["a"], difference["b"]) == ("scheduler", ["euler"], ["ddim"])
