"""Several workers do one run, by a Ray that is started for it: what is shared, what dies, and how it ends."""

from __future__ import annotations

import os
import signal
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image

from tests.acceptance import claims, crew, product
from tests.waiting import until
from text2img.demo.judge import judge
from text2img.demo.scenes import all_scenes

PATIENCE = 120  # seconds
DRAWN = ("--model-id", str(product.MODEL), "--num-inference-steps", "8", "--guidance-scale", "3")
SCENES = [scene for scene in all_scenes() if scene.size == "large"]
TOKEN = "hush-token-4711"
SLOWLY = {"SLEEP_PER_IMAGE": "0.1"}  # so that the run has far to go when it is stopped


def _said_by_ray(word):
    """The files and command lines of Ray's that hold the word; other tests' come and go meanwhile."""
    held = [" ".join(each.info["cmdline"] or []) for each in psutil.process_iter(["cmdline"])]
    held = [line for line in held if word in line]
    for folder in Path("/tmp").glob("text2img-ray-*"):  # noqa: S108
        for inside, _, names in os.walk(folder):
            for path in (Path(inside, name) for name in names):
                with suppress(OSError):
                    held += [path] if path.is_file() and word.encode() in path.read_bytes() else []
    return held


def _shows(folder, number, scene):
    with Image.open(folder / "pictures" / f"{number}.png") as image:
        seen = judge(image)
    return (seen.colour, seen.background) == (scene.colour, scene.background)


@pytest.mark.parametrize(
    "prompts", [40, pytest.param(400, marks=[pytest.mark.scale, pytest.mark.timeout(1800)])]
)
def test_every_prompt_once_though_a_worker_is_killed(tmp_path, httpserver, prompts):
    """One of several workers dies by SIGKILL in the middle: every prompt has its own picture and one result,
    the receiver is told once, the status is the run's, and Ray has seen no secret.
    """
    httpserver.expect_request("/told").respond_with_data("")
    scenes = [SCENES[number % len(SCENES)] for number in range(prompts)]
    crew.enqueue(tmp_path, *(scene.caption for scene in scenes))
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute("INSERT INTO datasets (_id, text) VALUES (9999, '')")
    workers = "4" if prompts == 400 else "2"
    told = ("--callback-url", httpserver.url_for("/told"), "--run-id", "night")
    with crew.running(
        tmp_path, *DRAWN, *told, "--workers", workers, "--batch-size", "5",
        start=product.drawing, INTERNAL_API_TOKEN=TOKEN,
    ) as process:  # fmt: skip
        begun = until(
            lambda: crew.completed(tmp_path) >= prompts // 5 and crew.workers_of(tmp_path),
            lambda: _has_ended(process),
        )
        os.kill(begun[0], signal.SIGKILL)
        assert not _said_by_ray(TOKEN)
        line, _ = process.communicate()
    assert process.returncode == 3, crew.log_of(tmp_path)
    assert line.startswith(f"completed {prompts}, failed 1, remaining 0; ")
    assert crew.log_of(tmp_path).count(" died: ") == 1
    results = crew.rows(tmp_path, "SELECT dataset_id FROM dataset_records ORDER BY dataset_id")
    assert results == [(number,) for number in range(1, prompts + 1)]
    wrong = [number for number, scene in enumerate(scenes, 1) if not _shows(tmp_path, number, scene)]
    assert not wrong
    runs = crew.rows(tmp_path, "SELECT _id, status, completed, failed FROM runs")
    assert runs == [("night", "completed", prompts, 1)]
    ((request, _),) = httpserver.log
    body = request.get_json()
    assert (body["final"], body["counts"]) == (True, {"completed": prompts, "error": 1})


def _has_ended(process):
    return process.poll() is not None


def _two_at_work(folder, process):
    """Wait until two workers hold prompts and ten are made; the workers' processes."""

    def begun():
        workers = crew.workers_of(folder)
        return crew.completed(folder) >= 10 and len(workers) == 2 and workers

    return [psutil.Process(pid) for pid in until(begun, lambda: _has_ended(process))]


def test_a_run_that_is_killed_leaves_no_worker_and_the_next_goes_on(tmp_path):
    """SIGKILL of the run itself: its workers end by themselves; the next run makes the rest."""
    crew.enqueue(tmp_path, *crew.boats(160))
    job = ("--workers", "2", "--batch-size", "5", "--lease-seconds", "3")
    with crew.running(tmp_path, *job, **SLOWLY) as process:
        workers = _two_at_work(tmp_path, process)
        process.kill()
    _gone, alive = psutil.wait_procs(workers, timeout=PATIENCE)
    assert not alive
    until(lambda: not claims.any_runs(tmp_path / "prompts.db"))
    before = crew.completed(tmp_path)
    assert 10 <= before < 160
    status, line = crew.finished(tmp_path, *job)
    assert (status, line.split(";")[0]) == (0, f"completed {160 - before}, failed 0, remaining 0")
    assert len(crew.rows(tmp_path, "SELECT dataset_id FROM dataset_records")) == 160


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_workers_and_releases_what_they_claimed(tmp_path, number, status):
    """Asked to end, alone or (as by a terminal) with its whole group, a run keeps what is finished, gives
    back the rest of all its workers, and leaves none of them behind.
    """
    crew.enqueue(tmp_path, *crew.boats(200))
    with crew.running(tmp_path, "--workers", "2", "--batch-size", "5", **SLOWLY) as process:
        workers = _two_at_work(tmp_path, process)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        line, _ = process.communicate()
    assert process.returncode == status, crew.log_of(tmp_path)
    assert "grace period" not in crew.log_of(tmp_path)
    assert not crew.hold(tmp_path)
    done = crew.completed(tmp_path)
    assert line.startswith(f"completed {done}, failed 0, remaining {200 - done}; ")
    assert 10 <= done < 200
    assert not psutil.wait_procs(workers, timeout=PATIENCE)[1]
    assert "Traceback" not in crew.log_of(tmp_path)
    assert all(row.startswith("{") for row in crew.log_of(tmp_path).splitlines())


def test_without_ray_a_sentence_says_what_to_install(tmp_path):
    """Asked for workers where Ray is not installed, a run ends with status 2 and names the package."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['ray'] = None\n")
    finished = product.run(*crew.JOB, "--workers", "2", folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert finished.returncode == 2
    (line,) = product.errors(finished)
    assert "pip install 'ray==" in line
    assert not (tmp_path / "prompts.db").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (crew.JOB, "SQLite is a file on one machine"),
        (("--mongo-uri", "mongodb://127.0.0.1:9/", "--output", "pictures"), "a folder is on one machine"),
        (("--mongo-uri", "mongodb://127.0.0.1:9/", "--output", "gs://bucket/p"), "ray job submit"),
    ],
)
def test_what_machines_cannot_share_is_refused(tmp_path, arguments, words):
    """SQLite or a folder with a cluster elsewhere, and a client's connection: status 2 and a sentence."""
    address = "ray://203.0.113.9:10001" if "gs" in arguments[-1] else "203.0.113.9:6379"
    finished = product.run(*arguments, "--workers", "auto", "--ray-address", address, folder=tmp_path)
    assert finished.returncode == 2
    (line,) = product.errors(finished)
    assert words in line
    assert not list(tmp_path.iterdir())
