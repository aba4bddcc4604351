"""Several pictures of a prompt, aspect ratios, tags and names by a template, through ``python main.py``."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing

import pytest
from PIL import Image

from tests.acceptance import claims, product
from tests.acceptance.product import sleeping
from tests.waiting import until
from text2img.demo.judge import judge
from text2img.images import read_parameters

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
QUICK = ("--num-inference-steps", "10", "--guidance-scale", "3", "--batch-size", "4")
CAPTION = "a large red circle on a blue background"


def _enqueue(folder, *entries):
    (folder / "prompts.json").write_text(json.dumps(entries))
    return product.run("enqueue", *JOB[:2], "prompts.json", folder=folder)


def _row(folder, prompt, table="datasets", key="_id"):
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        database.row_factory = sqlite3.Row
        return dict(database.execute(f"SELECT * FROM {table} WHERE {key} = ?", [prompt]).fetchone())  # noqa: S608


def _pictures(folder):
    return {path.stem: path for path in (folder / "pictures").rglob("*.png")}


def _parameters(path):
    return read_parameters(path.read_bytes())


def test_what_was_asked_for_is_made_stored_and_told(tmp_path, httpserver):
    """Five pictures of a prompt and others of other shapes: seeds, sizes, names, documents, result, callback
    and last line agree, and every picture shows its caption.
    """
    httpserver.expect_request("/told", method="POST").respond_with_data("")
    tags = CAPTION.split()
    entries = (
        {"id": 1, "text": CAPTION, "num_images": 5, "seed": 70},
        {"id": 2, "prompt_tags": tags, "aspect_ratio": "3:2"},
        {"id": 3, "text": CAPTION, "aspect_ratio": "1:2", "width": 128, "height": 128},
    )
    assert _enqueue(tmp_path, *entries).returncode == 0
    told = ("--callback-url", httpserver.url_for("/told"), "--object-name", "2026/gen_{generation_id}")
    planned = product.run(*JOB, *QUICK, "--dry-run", folder=tmp_path).stdout
    assert "batch 1: 4 × the model's own size" in planned
    assert "1 (image 1), 1 (image 2), 1 (image 3), 1 (image 4)\n" in planned
    assert "1 × 3:2 of the model's own size" in planned
    finished = sleeping.run(*JOB, *QUICK, *told, folder=tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("completed 3 (7 images), failed 0, remaining 0; ")
    assert "3 completed (7 images), 0 failed" in product.run("status", *JOB[:2], folder=tmp_path).stdout
    pictures, names = _pictures(tmp_path), ["gen_1", *(f"gen_1~{n}" for n in range(1, 5))]
    assert set(pictures) == {*names, "gen_2", "gen_3"}
    assert [_parameters(pictures[name])["seed"] for name in names] == [70, 71, 72, 73, 74]
    assert len({pictures[name].read_bytes() for name in names}) == 5
    for path in pictures.values():
        with Image.open(path) as image:
            seen = judge(image.resize((128, 128)))
        assert (seen.colour, seen.background) == ("red", "blue"), path
    row, result = _row(tmp_path, 1), _row(tmp_path, 1, "dataset_records", "dataset_id")
    urls = [str(pictures[name]) for name in names]
    assert json.loads(row["image_urls"]) == json.loads(result["image_urls"]) == urls
    assert row["image_url"] == result["image_url"] == urls[0]
    assert (json.loads(row["used"])["seed"], json.loads(row["used"])["num_images"], row["seed"]) == (
        70,
        5,
        70,
    )
    used = json.loads(_row(tmp_path, 2)["used"])
    assert (used["width"], used["height"], used["aspect_ratio"]) == (160, 104, "3:2")
    with Image.open(pictures["gen_2"]) as image:
        assert image.size == (160, 104)
    with Image.open(pictures["gen_3"]) as image:
        assert image.size == (128, 128)
    assert _row(tmp_path, 2, "dataset_records", "dataset_id")["prompt"] == CAPTION
    ((request, _),) = httpserver.log
    entries = {each["prompt_id"]: each for each in request.get_json()["results"]}
    assert (entries["1"]["image_url"], entries["1"]["image_urls"]) == (urls[0], urls)
    assert (entries["1"]["seed"], entries["2"]["prompt"]) == (70, CAPTION)
    assert "image_urls" not in entries["2"]


def test_each_picture_of_several_is_the_one_of_its_seed(tmp_path):
    """Made by itself in a batch of one, a prompt of seed + 3 gets the picture that was the fourth of five."""
    assert _enqueue(tmp_path, {"id": 1, "text": CAPTION, "num_images": 5, "seed": 70}).returncode == 0
    alone = (*QUICK[:4], "--batch-size", "1")
    assert sleeping.run(*JOB, *alone, folder=tmp_path).returncode == 0
    assert _enqueue(tmp_path, {"id": 2, "text": CAPTION, "seed": 73}).returncode == 0
    assert sleeping.run(*JOB, *alone, folder=tmp_path).returncode == 0
    pictures = _pictures(tmp_path)
    assert pictures["1~3"].read_bytes() == pictures["2"].read_bytes()


def _kill_when(folder, condition, *flags):
    """Start a run and kill it once the condition holds; the run must be alive until then."""
    with sleeping.running(*JOB, *flags, folder=folder) as process:
        until(condition, lambda: process.poll() is not None)


def test_killed_in_the_middle_of_five_pictures_a_prompt_is_made_once(tmp_path):
    """SIGKILL after the second of five pictures is stored: nothing is recorded of the prompt, the next run
    makes it whole under the same names, and there is one result and nothing else in the folder.
    """
    text = f"{CAPTION}, hold from 2"
    assert _enqueue(tmp_path, {"id": 1, "text": text, "num_images": 5, "seed": 70}).returncode == 0
    flags = ("--batch-size", "1", "--lease-seconds", "1")
    _kill_when(tmp_path, (tmp_path / "pictures" / "1~1.png").exists, *flags)
    assert set(_pictures(tmp_path)) == {"1", "1~1"}
    row = _row(tmp_path, 1)
    assert (row["status"], row["image_url"], row["image_urls"]) == ("processing", None, None)
    stored = {name: path.stat().st_mtime_ns for name, path in _pictures(tmp_path).items()}
    (tmp_path / "release").touch()
    until(lambda: not claims.any_runs(tmp_path / "prompts.db"))
    finished = sleeping.run(*JOB, *flags, folder=tmp_path)
    assert finished.stdout.startswith("completed 1 (5 images), failed 0, remaining 0"), finished.stderr
    row = _row(tmp_path, 1)
    assert (row["status"], len(json.loads(row["image_urls"])), row["deaths"]) == ("completed", 5, None)
    assert set(_pictures(tmp_path)) == {"1", "1~1", "1~2", "1~3", "1~4"}
    assert len(list((tmp_path / "pictures").iterdir())) - _temporary(tmp_path) == 5
    # The same pictures again were left alone.
    assert {name: _pictures(tmp_path)[name].stat().st_mtime_ns for name in stored} == stored
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database:
        assert database.execute("SELECT count(*) FROM dataset_records").fetchone() == (1,)


def _temporary(folder):
    """How many files a killed writer left behind, which a later run removes."""
    return sum(path.name.startswith(".text2img-") for path in (folder / "pictures").iterdir())


def test_a_retry_reads_what_its_owner_wrote(tmp_path):
    """A prompt whose third picture fails ends in error once; put back, it is made again from its own fields,
    under the same names.
    """
    entry = {"id": 1, "text": CAPTION, "num_images": 3, "aspect_ratio": "1:1"}
    assert _enqueue(tmp_path, entry).returncode == 0
    blocked = tmp_path / "pictures" / "1~2.png"
    blocked.mkdir(parents=True)  # no picture can have this name
    failed = sleeping.run(*JOB, *QUICK, folder=tmp_path)
    assert (failed.returncode, failed.stdout.startswith("completed 0, failed 1")) == (3, True), failed.stderr
    row = _row(tmp_path, 1)
    assert (row["status"], row["error_code"], row["image_url"]) == ("error", "storage_rejected", None)
    blocked.rmdir()
    assert "reset 1 failed" in product.run("retry", *JOB[:2], folder=tmp_path).stdout
    done = sleeping.run(*JOB, *QUICK, "--num-images", "2", folder=tmp_path)
    assert done.stdout.startswith("completed 1 (3 images)"), done.stderr
    row = _row(tmp_path, 1)
    assert (row["num_images"], row["aspect_ratio"], row["seed"], row["error"]) == (3, "1:1", None, None)
    assert set(_pictures(tmp_path)) == {"1", "1~1", "1~2"}


def test_what_cannot_be_asked_for_is_refused(tmp_path):
    """Rows end in their error code, with a sentence that names the field; each for itself."""
    assert _enqueue(tmp_path, {"id": 1, "text": CAPTION}).returncode == 0
    drawn, largest = {"text": CAPTION}, 2**63 - 1
    columns = ("text", "prompt_tags", "aspect_ratio", "num_images", "seed", "lora")
    rows = {
        2: ("invalid_prompt", "prompt_tags must contain only texts", {"prompt_tags": '["a", 7]'}),
        3: ("invalid_prompt", "prompt_tags must be a list of texts", {"prompt_tags": "a red circle"}),
        4: ("invalid_prompt", "prompt_tags is empty", {"prompt_tags": "[]"}),
        5: ("invalid_parameters", "aspect_ratio must be one of", {**drawn, "aspect_ratio": "5:4"}),
        6: ("invalid_parameters", "num_images must be between 1 and 100", {**drawn, "num_images": 101}),
        7: ("invalid_parameters", "seed must leave room", {**drawn, "num_images": 2, "seed": largest}),
        8: ("invalid_parameters", "lora 1: path is missing", {**drawn, "lora": '{"weight": 1}'}),
    }  # fmt: skip
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        for prompt, (_, _, fields) in rows.items():
            values = [fields.get(name) for name in columns]
            database.execute(
                f"INSERT INTO datasets (_id, {', '.join(columns)}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                [prompt, *values],
            )
    finished = sleeping.run(*JOB, *QUICK, folder=tmp_path)
    assert finished.stdout.startswith("completed 1, failed 7"), finished.stderr
    for prompt, (code, message, _) in rows.items():
        row = _row(tmp_path, prompt)
        assert (row["error_code"], row["error"].startswith(message)) == (code, True), row["error"]


def test_who_asks_for_shape_and_number(tmp_path):
    """The model configuration's wishes hold where nobody else has any; a variable beats them, a flag that,
    and the prompt's own fields beat all. A dry run says what would be made.
    """
    own = {"aspect_ratio": "1:2", "num_images": 1}
    assert _enqueue(tmp_path, {"id": 1, "text": CAPTION}, {"id": 2, "text": CAPTION, **own}).returncode == 0

    def planned(*flags, **variables):
        said = product.run(*JOB, *flags, "--dry-run", folder=tmp_path, **variables).stdout.splitlines()[1:]
        return {line.split(": ")[-1]: line.split(" × ")[1].split(", ")[0] for line in said}

    shaped, two = "{} of the model's own size".format, "1 (image 1), 1 (image 2)"
    assert planned() == {"1": "the model's own size", "2": shaped("1:2")}
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute("INSERT INTO model_configs (_id, aspect_ratio, num_images) VALUES (1, '3:2', 2)")
    assert planned() == {two: shaped("3:2"), "2": shaped("1:2")}
    assert planned(ASPECT_RATIO="2:1", NUM_IMAGES="1") == {"1": shaped("2:1"), "2": shaped("1:2")}
    assert planned("--aspect-ratio", "4:3", ASPECT_RATIO="2:1") == {two: shaped("4:3"), "2": shaped("1:2")}
    assert planned("--width", "512", "--height", "256") == {two: "512×256", "2": shaped("1:2")}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--aspect-ratio", "5:4"), "--aspect-ratio must be one of 1:1"),
        (("--num-images", "0"), "--num-images must be between 1 and 100"),
        (("--num-images", "many"), "--num-images (NUM_IMAGES):"),
        (("--object-name", "picture"), "--object-name (OBJECT_NAME): it must contain {id}"),
        (("--object-name", "../{id}"), "--object-name (OBJECT_NAME): no part of it may"),
    ],
)
def test_wrong_options_are_refused_before_anything(tmp_path, flags, said):
    """Status 2 and one line that names the option, before the database is even made."""
    finished = product.run(*JOB, *flags, folder=tmp_path)
    (line,) = product.errors(finished)
    assert (finished.returncode, said in line) == (2, True), line
    assert not (tmp_path / "prompts.db").exists()


def test_a_file_that_asks_wrongly_adds_nothing(tmp_path):
    """``enqueue`` names the field, for each of the new fields."""
    wrong = [
        ({"prompt_tags": "red, circle"}, "prompt_tags must be a list of texts"),
        ({"text": "a", "num_images": 1.5}, "num_images must be a whole number"),
        ({"text": "a", "aspect_ratio": "16:10"}, "did you mean"),
        ({"text": "a", "lora": "ink.safetensors"}, "lora must be"),
        ({"text": "a", "webhook_url": 7}, "webhook_url must be text"),
        ({"text": "a", "num_image": 2}, "unknown field 'num_image'; did you mean num_images?"),
    ]
    finished = _enqueue(tmp_path, *(entry for entry, _ in wrong))
    lines = json.loads(product.errors(finished)[-1])["message"].splitlines()
    assert (finished.returncode, len(lines)) == (2, len(wrong))
    for (_, said), line in zip(wrong, lines, strict=True):
        assert said in line


def test_rows_of_a_table_may_hold_lists(tmp_path):
    """In a CSV file a cell of tags or LoRAs is JSON; the prompt's text is the joined tags."""
    (tmp_path / "prompts.csv").write_text(
        'id,prompt_tags,lora,num_images\n1,"[""a"", ""b""]","{""path"": ""ink"", ""weight"": 0.5}",2\n'
    )
    added = product.run("enqueue", *JOB[:2], "prompts.csv", folder=tmp_path)
    assert added.returncode == 0, added.stderr
    row = _row(tmp_path, "1")
    assert (row["text"], row["num_images"], json.loads(row["lora"])["path"]) == ("a b", 2, "ink")
