"""Files of other programs and other databases where the product writes: none of them is lost."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing

import pytest
from google.cloud import storage

from tests.acceptance import product
from tests.acceptance.product import sleeping
from tests.servers.s3 import client

MODEL = ("--model-id", str(product.MODEL), "--num-inference-steps", "2")
CIRCLE, SQUARE, STAR = (
    "a small red circle on a blue background",
    "a large green square on a yellow background",
    "a small blue star on a black background",
)
OWN = "mine\n"


class Output:
    """Where images go: the flag's value, the variables that lead there, and what lies there."""

    def __init__(self, url, variables, read):
        self.url, self.variables, self.read = url, variables, read


@pytest.fixture(params=["folder", "gcs", "s3"])
def output(request, tmp_path):
    """An output of each kind, empty."""
    if request.param == "folder":
        folder = tmp_path / "out"
        return Output(
            str(folder), {}, lambda: {path.name: _sha256(path.read_bytes()) for path in folder.iterdir()}
        )
    if request.param == "s3":
        server = request.getfixturevalue("s3")
        return Output(
            f"s3://{server.bucket}/{tmp_path.name}", server.variables, lambda: _s3(server, tmp_path.name)
        )
    server = request.getfixturevalue("gcs")
    variables = {"STORAGE_EMULATOR_HOST": server.host}
    return Output(f"gs://{server.bucket}/{tmp_path.name}", variables, lambda: _gcs(server, tmp_path.name))


def _s3(server, prefix):
    bucket = client(server)
    found = bucket.list_objects_v2(Bucket=server.bucket, Prefix=f"{prefix}/").get("Contents", [])
    return {
        each["Key"].removeprefix(f"{prefix}/"): _sha256(
            bucket.get_object(Bucket=server.bucket, Key=each["Key"])["Body"].read()
        )
        for each in found
    }


def _gcs(server, prefix):
    blobs = storage.Client().bucket(server.bucket).list_blobs(prefix=f"{prefix}/")
    return {blob.name.removeprefix(f"{prefix}/"): _sha256(blob.download_as_bytes()) for blob in blobs}


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _run(folder, database, output, text, *arguments, **more):
    """Run a database's file of one prompt, ``1``, into the output."""
    (folder / f"{database}.jsonl").write_text(json.dumps({"id": "1", "text": text, **more}))
    return sleeping.run(
        "run", "--database", f"sqlite:///{database}.db", "--input-file", f"{database}.jsonl",
        "--output", output.url, *MODEL, *arguments, folder=folder, **output.variables,
    )  # fmt: skip


def _row(folder, database):
    with closing(sqlite3.connect(folder / f"{database}.db")) as opened:
        opened.row_factory = sqlite3.Row
        return dict(opened.execute("SELECT * FROM datasets").fetchone())


def test_two_databases_share_an_output(tmp_path, output):
    """The second database's prompt of the same id fails with the reason, and the first one's image stays; the
    first one may change its prompt and replace its image, and the second one's next try changes nothing.
    """
    first = _run(tmp_path, "a", output, CIRCLE)
    assert first.returncode == 0, first.stderr
    (stored,) = output.read().items()
    second = _run(tmp_path, "b", output, SQUARE)
    assert second.returncode == 3, second.stderr
    assert (_row(tmp_path, "b")["status"], _row(tmp_path, "b")["error_code"]) == ("error", "storage_rejected")
    assert "not one that this database recorded" in _row(tmp_path, "b")["error"]
    assert list(output.read().items()) == [stored]
    changed = _run(tmp_path, "a", output, STAR)
    assert changed.returncode == 0, changed.stderr
    (replaced,) = output.read().values()
    assert replaced != stored[1]
    assert _row(tmp_path, "a")["sha256"] == replaced
    assert sleeping.run("retry", "--database", "sqlite:///b.db", folder=tmp_path).returncode == 0
    again = _run(tmp_path, "b", output, SQUARE)
    assert again.returncode == 3, again.stderr
    assert list(output.read().values()) == [replaced]


def test_two_databases_with_the_same_prompt_share_its_image(tmp_path, output):
    """An image of the very same parameters is complete for both, and is stored once."""
    assert _run(tmp_path, "a", output, CIRCLE).returncode == 0
    stored = output.read()
    assert _run(tmp_path, "b", output, CIRCLE).returncode == 0
    assert output.read() == stored
    assert _row(tmp_path, "a")["sha256"] == _row(tmp_path, "b")["sha256"]


@pytest.mark.smoke
def test_a_changed_prompt_replaces_its_images_through_failures(tmp_path):
    """Made with three images, changed to a LoRA that is refused, to one image, and to three others: each
    time the images that the database recorded give way.
    """
    output = Output(str(tmp_path / "out"), {}, None)
    statuses = [
        _run(tmp_path, "a", output, text, **more).returncode
        for text, more in [
            (CIRCLE, {"num_images": 3}),
            (SQUARE, {"num_images": 3, "lora": [{"path": "/nowhere/x.safetensors", "weight": 1}]}),
            (SQUARE, {}),
            (STAR, {"num_images": 3}),
        ]
    ]
    assert statuses == [0, 3, 0, 0]
    files = {path.name: _sha256(path.read_bytes()) for path in (tmp_path / "out").iterdir()}
    assert sorted(files) == ["1~str.png", "1~str~1.png", "1~str~2.png"]
    assert _row(tmp_path, "a")["sha256"] in files.values()
    assert set(files.values()) <= set(json.loads(_row(tmp_path, "a")["sha256s"]))


LAYOUT = ("--layout", "folders", "--evaluator", "demo")


def test_two_databases_share_an_output_of_folders(tmp_path):
    """In folders too: neither the image nor the files that describe it become the second database's."""
    output = Output(str(tmp_path / "out"), {}, None)
    assert _run(tmp_path, "a", output, CIRCLE, *LAYOUT).returncode == 0
    folder = tmp_path / "out" / "results"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(before) >= 4
    refused = _run(tmp_path, "b", output, SQUARE, *LAYOUT)
    assert refused.returncode == 3, refused.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    changed = _run(tmp_path, "a", output, STAR, *LAYOUT)
    assert (changed.returncode, "skipped" in changed.stderr) == (0, False), changed.stderr
    assert all(path.read_bytes() != before[path] for path in before)


def test_a_users_files_beside_the_images_stay(tmp_path):
    """A file of a user's own that has the name of one about a prompt is skipped; the others are written."""
    mine = tmp_path / "out" / "results" / "1~str" / "iteration_1_results.json"
    mine.parent.mkdir(parents=True)
    mine.write_text(OWN)
    done = _run(tmp_path, "a", Output(str(tmp_path / "out"), {}, None), CIRCLE, *LAYOUT)
    assert done.returncode == 0, done.stderr
    assert "iteration_1_results.json" in done.stderr
    assert mine.read_text() == OWN
    assert json.loads((mine.parent / "summary.json").read_text())["status"] == "completed"


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["summary.json", "contact-sheet.png", "contact-sheet-2.png", "scores.png"])
def test_a_foreign_summary_is_found_before_anything_is_touched(tmp_path, name):
    """``--output-dir`` on a folder of another program: status 2 that names the file, and nothing is new."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / name).write_text(OWN)
    (folder / "notes.txt").write_text(OWN)
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "1", "text": CIRCLE}))
    refused = sleeping.run(
        *("run", "--output-dir", "project", "--input-file", "a.jsonl", "--evaluator", "demo", *MODEL),
        folder=tmp_path,
    )
    assert refused.returncode == 2, refused.stderr
    (line,) = product.errors(refused)
    assert f"project/{name}" in line
    assert _files(folder) == {name: OWN.encode(), "notes.txt": OWN.encode()}


def test_a_runs_own_summary_is_replaced_and_other_files_stay(tmp_path):
    """What the run before wrote is drawn again; a user's files of other names are left alone."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "notes.txt").write_text(OWN)
    (folder / "cover.png").write_text(OWN)
    job = ("run", "--output-dir", "project", "--input-file", "a.jsonl", "--evaluator", "demo", *MODEL)
    before = None
    for text in (CIRCLE, SQUARE):
        (tmp_path / "a.jsonl").write_text(json.dumps({"id": "1", "text": text}))
        done = sleeping.run(*job, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        files = _files(folder)
        assert files["notes.txt"] == files["cover.png"] == OWN.encode()
        assert {"summary.json", "contact-sheet.png", "scores.png"} <= files.keys()
        assert files["contact-sheet.png"] != before
        before = files["contact-sheet.png"]
    (folder / "contact-sheet.png").write_text(OWN)
    assert sleeping.run(*job, folder=tmp_path).returncode == 2


def test_a_foreign_summary_in_a_bucket_is_found_before_a_claim(tmp_path, s3):
    """The same for a bucket: status 2, and the prompt is still pending."""
    bucket, key = client(s3), f"{tmp_path.name}/summary.json"
    bucket.put_object(Bucket=s3.bucket, Key=key, Body=OWN.encode())
    refused = _run(
        tmp_path, "a", Output(f"s3://{s3.bucket}/{tmp_path.name}", s3.variables, None), CIRCLE, *LAYOUT
    )
    assert refused.returncode == 2, refused.stderr
    assert _row(tmp_path, "a")["status"] == "pending"
    assert bucket.get_object(Bucket=s3.bucket, Key=key)["Body"].read() == OWN.encode()


DEMO = ("demo", "--output", "home")


@pytest.fixture
def home(tmp_path):
    """A folder with files of a user's own, and none that has a name of the demo's."""
    files = ("images/family.png", "demo.db.backup", "demo.db-old", "note.txt")
    for name in files:
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(OWN)
    return tmp_path / "home"


def _kept(home):
    return {
        str(path.relative_to(home))
        for path in home.rglob("*")
        if path.is_file() and path.read_bytes() == OWN.encode()
    }


@pytest.mark.smoke
def test_a_fresh_demo_removes_what_the_demo_made(tmp_path, home):
    """``demo --fresh`` makes its images again, and a user's files beside them are all there afterwards; one
    image that the user has replaced by another is not removed either, and fails its one prompt.
    """
    before = _kept(home)
    assert sleeping.run(*DEMO, folder=tmp_path).returncode == 0
    images = sorted(path for path in (home / "images").iterdir() if path.name != "family.png")
    assert len(images) == 12
    times = {path: path.stat().st_mtime_ns for path in images}
    fresh = sleeping.run(*DEMO, "--fresh", folder=tmp_path)
    assert fresh.stdout.startswith("completed 12"), fresh.stderr
    assert all(path.stat().st_mtime_ns != times[path] for path in images)
    assert _kept(home) == before
    images[0].write_text(OWN)
    fresh = sleeping.run(*DEMO, "--fresh", folder=tmp_path)
    assert (fresh.returncode, fresh.stdout[:23]) == (3, "completed 11, failed 1,"), fresh.stderr
    assert _kept(home) == {*before, f"images/{images[0].name}"}


@pytest.mark.parametrize("fresh", [(), ("--fresh",)], ids=["again", "fresh"])
@pytest.mark.parametrize("name", ["contact-sheet.png", "demo.db"])
def test_a_demo_meets_a_users_file_of_its_own_name(tmp_path, home, name, fresh):
    """Status 2 that names the file, and nothing is removed, replaced or new."""
    (home / name).write_text(OWN)
    before = _files(home)
    refused = sleeping.run(*DEMO, *fresh, folder=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert f"home/{name}" in refused.stderr
    assert _files(home) == before


def test_a_demo_meets_a_users_database(tmp_path, home):
    """A SQLite file of another program is no database of the demo's: no table is added to it."""
    with closing(sqlite3.connect(home / "demo.db")) as opened, opened:
        opened.execute("CREATE TABLE letters (id, text)")
    before = _files(home)
    for fresh in ((), ("--fresh",)):
        assert sleeping.run(*DEMO, *fresh, folder=tmp_path).returncode == 2
        assert _files(home) == before
