"""The whole way without a server: prompts from a file, SQLite, a folder."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from tests.acceptance import product
from tests.acceptance.product import sleeping
from tests.acceptance.scenes import GOOD
from text2img.demo.judge import judge
from text2img.demo.scenes import Scene

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
QUICK = ("--num-inference-steps", "10", "--guidance-scale", "3", "--batch-size", "4")


def _entry(good):
    """The prompt as a file says it: JSON has the ids' kinds only in MongoDB's extended form."""
    kind = type(good.id).__name__
    typed = {"ObjectId": {"$oid": str(good.id)}, "UUID": {"$uuid": str(good.id)}}.get(kind, good.id)
    known = {name: value for name, value in good.fields.items() if name != "owner"}
    return {"id": typed, "text": good.scene.caption, **known}


@pytest.mark.smoke
def test_the_same_prompts_through_sqlite_and_a_folder(tmp_path):
    """Prompts of mixed ids and parameters get their own pictures in a folder, bad ones their error code."""
    good = [one for one in GOOD if type(one.id).__name__ in {"int", "str", "ObjectId", "UUID"}]
    (tmp_path / "prompts.json").write_text(json.dumps([_entry(one) for one in good]))
    added = product.run("enqueue", *JOB[:2], "prompts.json", folder=tmp_path)
    assert added.stdout == f"added {len(good)} of {len(good)} prompts; 0 were there already\n", added.stderr
    caption = "a large red circle on a blue background"
    bad = [
        (101, "", None, None, None),
        (102, 42, None, None, None),
        (103, caption, 65, None, None),
        (104, caption, None, 0, None),
        (105, caption, None, None, "NaN"),
    ]
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.executemany(
            "INSERT INTO datasets (_id, text, width, num_inference_steps, guidance_scale) VALUES (?,?,?,?,?)",
            bad,
        )
    database.close()
    first = sleeping.run(*JOB, *QUICK, folder=tmp_path)
    assert first.returncode == 3, first.stderr
    assert first.stdout.startswith(f"completed {len(good)}, failed 5, remaining 0")
    for one in good:
        with Image.open(tmp_path / "pictures" / f"{one.name}.png") as image:
            seen = judge(image)
        assert (seen.colour, seen.background) == (one.scene.colour, one.scene.background)
    assert len(list((tmp_path / "pictures").iterdir())) == len(good)
    second = sleeping.run(*JOB, *QUICK, folder=tmp_path)
    assert (second.returncode, second.stdout.startswith("completed 0, failed 0")) == (0, True)
    status = product.run("status", *JOB[:2], folder=tmp_path)
    assert "invalid_parameters 3, invalid_prompt 2" in status.stdout


def _enqueue(tmp_path, *texts):
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    assert product.run("enqueue", *JOB[:2], "prompts.txt", folder=tmp_path).returncode == 0


@pytest.mark.smoke
def test_a_run_with_nothing_to_do_loads_no_torch(tmp_path):
    """Finding nothing, a run ends with status 0 and imports neither torch nor any other heavy library."""
    _enqueue(tmp_path)
    finished = product.run(*JOB, folder=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert finished.returncode == 0
    assert finished.stdout.startswith("completed 0, failed 0, remaining 0")
    imported = set(re.findall(r"^import time: .*\| +([\w.]+)$", finished.stderr, re.MULTILINE))
    assert "text2img.cli" in imported
    assert not imported & {"torch", "diffusers", "transformers", "google.cloud", "pymongo", "PIL", "numpy"}


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tmp_path):
    """``--dry-run`` lists batches and prompts that would fail; claims, writes and loads nothing."""
    _enqueue(tmp_path, "a large red circle on a blue background", "a small green star on a white background")
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute("INSERT INTO datasets (_id, text, width) VALUES (7, 'a cat', 65)")
    database.close()
    before = {path.name for path in tmp_path.iterdir()}
    finished = product.run(*JOB, "--dry-run", folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "3 prompts would be made by" in finished.stdout
    assert "batch 1: 2 × the model's own size, 50 steps, guidance 7.5" in finished.stdout
    assert "7 would fail: width must be a multiple of 8" in finished.stdout
    assert {path.name for path in tmp_path.iterdir()} == before
    assert "pending            3" in product.run("status", *JOB[:2], folder=tmp_path).stdout


def test_the_same_seed_makes_the_same_picture(tmp_path):
    """A prompt that is put back and made again gets the very same bytes, though its neighbours have gone."""
    colours = ("red", "green", "blue", "black")
    texts = [Scene("large", colour, "circle", "white").caption for colour in colours]
    _enqueue(tmp_path, *texts)
    assert sleeping.run(*JOB, *QUICK, folder=tmp_path).returncode == 0
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        put_back = "UPDATE datasets SET status = 'pending' WHERE rowid > 2 RETURNING image_url"
        again = [Path(url) for (url,) in database.execute(put_back)]
    database.close()
    for path in again:
        path.unlink()
    second = sleeping.run(*JOB, *QUICK, folder=tmp_path)
    assert second.stdout.startswith("completed 2"), second.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()} == pictures


def test_limit_and_dataset_and_retry(tmp_path):
    """``--limit`` bounds what a run takes, ``--dataset-id`` chooses, ``retry`` puts failed prompts back."""
    caption = "a large red circle on a blue background"
    rows = [{"id": n, "text": caption, "dataset_id": n % 2} for n in range(6)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sleeping.run("enqueue", *JOB[:2], "prompts.jsonl", folder=tmp_path)
    limited = sleeping.run(*JOB, *QUICK, "--limit", "2", "--dataset-id", "1", folder=tmp_path)
    assert limited.stdout.startswith("completed 2, failed 0, remaining 1;"), limited.stderr
    refused = sleeping.run(*JOB, *QUICK, "--dataset-id", "1", folder=tmp_path, NEGATIVE_PROMPT="blurry")
    assert refused.stdout.startswith("completed 1, failed 0, remaining 0"), refused.stderr
    assert "pending            3" in sleeping.run("status", *JOB[:2], folder=tmp_path).stdout
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute("UPDATE datasets SET text = '' WHERE _id = 0")
        (used,) = database.execute("SELECT used FROM datasets WHERE _id = 5").fetchone()
    database.close()
    assert json.loads(used)["num_inference_steps"] == 10
    failed = sleeping.run(*JOB, *QUICK, folder=tmp_path)
    assert (failed.returncode, failed.stdout.startswith("completed 2, failed 1")) == (3, True), failed.stderr
    assert "put 0 failed" in sleeping.run("retry", *JOB[:2], "--error-code", "safety", folder=tmp_path).stdout
    assert "put 1 failed" in sleeping.run("retry", *JOB[:2], folder=tmp_path).stdout
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute("UPDATE datasets SET text = ? WHERE _id = 0", (caption,))
    database.close()
    assert sleeping.run(*JOB, *QUICK, folder=tmp_path).stdout.startswith("completed 1, failed 0")
