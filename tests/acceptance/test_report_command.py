"""``report`` as a command: what it reads and leaves alone, what it says, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.acceptance import nights, product
from text2img.storage import open_storage

DATABASE = ("--database", "sqlite:///prompts.db")


@pytest.fixture
def usual(tmp_path):
    """A folder with the usual nights in it."""
    nights.usual(tmp_path)
    return tmp_path


def _items(file):
    begin = '<script type="application/json" class="items">'
    parts = file.read_text("utf-8").split(begin)[1:]
    return [item for part in parts for item in json.loads(part.split("</script>")[0])]


def _ids(file):
    return sorted(int(item["id"]) for item in _items(file))


def test_data_set_and_run_narrow_it(usual):
    """By flags, and by the variables that a run takes as well; both together are both."""
    for arguments, variables, ids in [
        (("--run-id", "tuesday"), {}, [3, 9]),
        ((), {"RUN_ID": "tuesday"}, [3, 9]),
        (("--dataset-id", "autumn"), {}, [4, 11]),
        (("--dataset-id", "autumn", "--run-id=monday"), {}, [4, 11]),
        (("--dataset-id", "spring", "--run-id=tuesday"), {}, [3, 9]),
    ]:
        finished = product.run(
            "report", *DATABASE, *arguments, "--html", "some.html", folder=usual, **variables
        )
        assert (finished.returncode, finished.stderr) == (0, "")
        assert finished.stdout.startswith("some.html: ")
        assert _ids(usual / "some.html") == ids, arguments


def test_it_changes_nothing(usual):
    """The database's file is the same to the byte afterwards, and nothing but the report is new."""
    before = {path: path.read_bytes() for path in usual.rglob("*") if path.is_file()}
    assert product.run("report", *DATABASE, folder=usual).returncode == 0
    after = {path: path.read_bytes() for path in usual.rglob("*") if path.is_file()}
    assert after.pop(usual / "report.html")
    assert {path: data for path, data in after.items() if not path.name.endswith(("-wal", "-shm"))} == before


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        ((*DATABASE, "--run-id", "nowhere"), 2, "there is no run 'nowhere'"),
        ((*DATABASE, "--html", "no/folder/report.html"), 2, "no/folder/report.html"),
        (("--database", "sqlite:///other.db"), 2, "other.db"),
        ((), 2, "--database"),
    ],
)
def test_what_cannot_be_is_one_line(usual, arguments, status, named):
    """An unknown run, a file that cannot be written, no database: one line that says what, and no report."""
    refused = product.run("report", *arguments, folder=usual)
    (line,) = product.errors(refused)
    assert (refused.returncode, named in line, refused.stdout) == (status, True, ""), line
    assert not (usual / "report.html").exists()


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_pictures_in_buckets_are_seen_or_say_why(kind, request, tmp_path):
    """Found by their URLs alone or by --output; beside that, and where the object is gone, a reason."""
    output, server = _in_a_bucket(kind, request, tmp_path)
    for arguments, reasons in [
        ((), ("", "does not exist")),
        (("--output", output), ("", "is not in")),
        (("--output", str(tmp_path / "pictures")), ("is not in", "is not in")),
    ]:
        finished = product.run("report", *DATABASE, *arguments, folder=tmp_path, **server)
        assert finished.returncode == 0, finished.stderr
        assert all(_reasons(tmp_path, reasons)), arguments


def _in_a_bucket(kind, request, folder):
    """Two prompts, the picture of one is in a bucket; the output's URL, and what names the server."""
    server = request.getfixturevalue(kind)
    known = server.variables if kind == "s3" else {"STORAGE_EMULATOR_HOST": server.host}
    output = f"{'s3' if kind == 's3' else 'gs'}://{server.bucket}/{folder.name}"
    night = nights.Nights(folder)
    image = Path(night.image("x", "red")).read_bytes()
    night.made(1, "a boat", image_url=open_storage(output).put("1.png", image, "image/png", lambda: True))
    night.made(2, "another", image_url=f"{output}-2/2.png")
    return output, known


def _reasons(folder, expected):
    """For each of the two pictures whether it has that reason, or a thumbnail where none is expected."""
    found = {item["id"]: item["pictures"][0] for item in _items(folder / "report.html")}
    for number, reason in zip("12", expected, strict=True):
        shown = found[number]
        yield reason in shown["reason"] if reason else "thumbnail" in shown
