"""What a run says of its time: in its last line, in what is kept of it, and as a plot."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from datetime import UTC, datetime

import pytest
from PIL import Image

from tests.acceptance import product
from tests.acceptance.product import sleeping
from text2img.databases import Collections, Run, open_database

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
QUICK = ("--num-inference-steps", "4", "--guidance-scale", "3", "--run-id", "night")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with 14 prompts, made in a run called ``night`` whose batches found their size."""
    folder = tmp_path_factory.mktemp("made")
    rows = [{"id": n, "text": "a large red circle on a blue background"} for n in range(14)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert product.run("enqueue", *JOB[:2], "prompts.jsonl", folder=folder).returncode == 0
    finished = sleeping.run(*JOB, *QUICK, "--batch-size", "auto:4", "--log-level", "DEBUG", folder=folder)
    assert finished.returncode == 0, finished.stderr
    return folder, finished


def test_the_last_line_says_where_the_time_went(made):
    """Counts, pace, the stages of the device's thread, how busy it was, and where the pictures are."""
    (line,) = made[1].stdout.splitlines()
    assert re.fullmatch(
        r"completed 14, failed 0, remaining 0; \d+\.\d\d images/s; "
        r"\d+\.\d s: (load|denoise) \d+\.\d(, \w+ \d+\.\d)*; "
        r"device busy \d+ % between first and last batch; pictures",
        line,
    ), line


def test_the_run_is_kept_with_its_seconds(made):
    """Seconds by stage, both shares of the device, the steady pace; the device's stages fit into the run."""
    with closing(sqlite3.connect(made[0] / "prompts.db")) as database, database:
        database.row_factory = sqlite3.Row
        run = dict(database.execute("SELECT * FROM runs WHERE _id = 'night'").fetchone())
        took = "SELECT (julianday(finished_at) - julianday(started_at)) * 86400 FROM runs"
        (whole,) = database.execute(took).fetchone()
    database.close()
    seconds = json.loads(run["seconds"])
    stages = {"claim", "load", "compile", "denoise", "decode", "encode", "upload", "record", "wait"}
    assert stages <= set(seconds)
    assert sum(seconds[stage] for stage in ("load", "compile", "denoise", "decode", "wait")) <= whole + 0.1
    assert 0 < run["device_busy_of_run"] < run["device_busy"] <= 1
    assert run["steady_images_per_second"] > 0
    assert run["peak_memory"] > 0


def test_auto_finds_a_size_within_its_cap(made):
    """Batches of 1 come first, then larger ones, none above the cap; every prompt got its picture."""
    events = [json.loads(line) for line in product.errors(made[1])]
    sizes = [event["size"] for event in events if event.get("event") == "batch"]
    assert (sizes[0], sum(sizes)) == (1, 14)
    assert 1 < max(sizes) <= 4
    assert len(list((made[0] / "pictures").iterdir())) == 14


def test_a_plot_shows_it(made):
    """In the terminal, and as a PNG where a file is named; ``last`` is the latest run."""
    shown = product.run("status", *JOB[:2], "--plot", "last", folder=made[0])
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("night, ")
    assert "  denoise  " in shown.stdout
    drawn = product.run("status", *JOB[:2], "--plot", "night", "--plot-file", "run.png", folder=made[0])
    assert drawn.returncode == 0, drawn.stderr
    with Image.open(made[0] / "run.png") as image:
        assert (image.format, image.size[0]) == ("PNG", 900)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--plot", "nowhere"), "nowhere"),
        (("--plot-file", "run.png"), "--plot"),
        (("--plot", "last", "--plot-file", "no/folder/run.png"), "no/folder/run.png"),
    ],
)
def test_a_plot_that_cannot_be_is_one_line(made, arguments, named):
    """An unknown run, a file without a run, a file that cannot be written: status 2, and what is wrong."""
    refused = product.run("status", *JOB[:2], *arguments, folder=made[0])
    (line,) = product.errors(refused)
    assert (refused.returncode, named in line, refused.stdout) == (2, True, "")


def test_a_run_whose_process_is_gone_is_not_said_to_run(tmp_path):
    """Of two runs that were never ended, the one whose lease is over is interrupted, the other is running."""
    now = datetime.now(UTC)
    with closing(open_database(f"sqlite:///{tmp_path}/prompts.db", Collections())) as database:
        database.runs.save_run(Run(id="killed", started_at=now, host="h"), -1)
        database.runs.save_run(Run(id="alive", started_at=now, host="h"), 600)
    said = product.run("status", *JOB[:2], folder=tmp_path).stdout
    found = dict(re.findall(r"^  (killed|alive) .* (interrupted|running) ", said, re.MULTILINE))
    assert found == {"killed": "interrupted", "alive": "running"}, said
