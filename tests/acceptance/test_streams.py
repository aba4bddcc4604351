"""Standard streams that are closed, full, or know no Unicode: the work is done, with its own status."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from tests.acceptance import product

DATABASE = ("--database", "sqlite:///prompts.db")
RUN = ("run", *DATABASE, "--output", "pictures")
FAILING = {"text": "a cat", "id": "bad", "width": 4096, "height": 4096, "num_images": 100}


@pytest.fixture
def folder(tmp_path):
    """A folder with a prompt that ASCII cannot show."""
    product.add(tmp_path, {"id": "caf\u00e9", "text": "a caf\u00e9 in red"})
    return tmp_path


def redirected(streams: str, *arguments: str, folder, **variables: str):
    """Run the product with redirections of a shell."""
    script = f'exec "$@" {streams}'
    return subprocess.run(
        ["/bin/sh", "-c", script, "sh", *product.sleeping.command(*arguments)],
        cwd=folder, env=product.environment(folder, **variables), capture_output=True, text=True, check=False,
        timeout=product.HANG,
    )  # fmt: skip


def statuses(folder) -> list[str]:
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
        return [status for (status,) in database.execute("select status from datasets order by _id")]


@pytest.mark.parametrize(
    "streams", [">&-", "2>&-", "<&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-", "2>/dev/full", ">&- 2>/dev/full"]
)
def test_a_run_does_its_work_without_streams(folder, streams) -> None:
    """The prompt is completed, no trace is shown, and what libraries print is in no file of the run's."""
    done = redirected(streams, *RUN, folder=folder)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert statuses(folder) == ["completed"]
    if ">&-" not in streams.replace("2>&-", ""):
        assert done.stdout.startswith("completed 1")
    files = [path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()]
    assert not any(b"completed 1, failed" in content for content in files)


@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "2>/dev/full"])
def test_the_status_is_that_of_the_work(folder, streams) -> None:
    """A failed prompt is status 3, and wrong usage status 2, as with streams."""
    product.add(folder, FAILING)
    assert redirected(streams, *RUN, folder=folder).returncode == 3
    assert statuses(folder) == ["error", "completed"]
    assert redirected(streams, "run", "--no-such-flag", folder=folder).returncode == 2
    assert redirected(streams, "status", "--database", "sqlite:///none.db", folder=folder).returncode == 2


def test_a_closed_standard_input_is_no_file_of_prompts(folder) -> None:
    """To read prompts from it is an error of usage, in one line."""
    done = redirected("<&-", "enqueue", "-", *DATABASE, folder=folder)
    assert done.returncode == 2
    assert "standard input" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("--help",), 0),
        (("run", "--help"), 0),
        (("run", "--dry-run", *RUN[1:]), 0),
        (("status", *DATABASE), 0),
        (("doctor", *RUN[1:], "--model-id", str(product.MODEL)), 0),
        (RUN, 0),
        (("status", *DATABASE, "--plot", "é"), 2),
        (("run", "--scheduler", "é", *RUN[1:]), 2),
    ],
    ids=["help", "run --help", "dry-run", "status", "doctor", "run", "plot", "wrong usage"],
)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1:strict"])
def test_what_the_encoding_lacks_is_escaped(folder, command, status, encoding) -> None:
    """Every command answers on a terminal without Unicode, with the status that it has elsewhere."""
    done = subprocess.run(
        product.sleeping.command(*command), env=product.environment(folder, PYTHONIOENCODING=encoding),
        cwd=folder, capture_output=True, check=False, timeout=product.HANG,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"UnicodeEncodeError" not in done.stderr


def test_the_schema_is_json_in_every_encoding(folder) -> None:
    """What is written for programs is ASCII, and so the same bytes whatever the encoding."""
    ascii_only = product.run("schema", folder=folder, PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 0
    assert json.loads(ascii_only.stdout) == json.loads(product.run("schema", folder=folder).stdout)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [("status", *DATABASE), ("schema",), RUN, ("run", "--dry-run", *RUN[1:])])
def test_a_full_standard_output_is_reported_in_one_line(folder, command, unbuffered) -> None:
    """Status 1 with the reason, whether Python buffers or, as in most containers, does not."""
    done = redirected(">/dev/full", *command, folder=folder, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    assert "standard output cannot be written: No space left on device" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert statuses(folder) == ["completed" if command is RUN else "pending"]


@pytest.mark.parametrize("flag", ["--output", "--dataset-id", "--model-id", "--callback-secret"])
def test_a_value_that_is_not_utf_8_is_wrong_usage(folder, flag) -> None:
    """No database could store it: the option is named, before anything is claimed."""
    done = subprocess.run(
        [*product.sleeping.command(*RUN), flag, b"p\xff"], env=product.environment(folder),
        cwd=folder, capture_output=True, text=True, check=False, timeout=product.HANG,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith(f"text2img: {flag} ")
    assert statuses(folder) == ["pending"]
