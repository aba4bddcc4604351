"""Several workers do one run, by Ray: what is shared, what dies, and how it ends."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from PIL import Image
from pymongo import MongoClient

from tests.acceptance import product
from tests.servers import free_port
from text2img.demo.judge import judge
from text2img.demo.scenes import all_scenes

PATIENCE = 120  # seconds
JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures")
DRAWN = ("--model-id", str(product.MODEL), "--num-inference-steps", "8", "--guidance-scale", "3")
SCENES = [scene for scene in all_scenes() if scene.size == "large"]
TOKEN = "hush-token-4711"


def _enqueue(folder, *texts):
    rows = [{"id": number, "text": text} for number, text in enumerate(texts, 1)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert product.run("enqueue", *JOB[:2], "prompts.jsonl", folder=folder).returncode == 0


def _boats(number):
    return [f"boat {each}" for each in range(number)]


@contextmanager
def _running(folder, *arguments, start=product.sleeping, job=JOB, **variables):
    """The process, in a group of its own and killed at the end of the block if need be; its engine sleeps."""
    with (folder / "log").open("w") as log, subprocess.Popen(
        start.command("run", *job, *arguments),
        cwd=folder,
        env=product.environment(folder, PYTHONPATH=str(product.ROOT), **variables),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def _finished(folder, *arguments, **variables):
    """Its exit status and its line; what it logged is in the file ``log``."""
    with _running(folder, *arguments, **variables) as process:
        line, _ = process.communicate(timeout=2 * PATIENCE)
    return process.returncode, line


def _log(folder):
    return (folder / "log").read_text()


def _rows(folder, statement):
    with closing(sqlite3.connect(folder / "prompts.db", timeout=30)) as database:
        return database.execute(statement).fetchall()


def _completed(folder):
    return _rows(folder, "SELECT count(*) FROM datasets WHERE status = 'completed'")[0][0]


def _until(true, process=None):
    """Wait until so; nobody could tell us of it but the database and the kernel."""
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until, "waited in vain"
        assert process is None or process.poll() is None, "it ended before"
        time.sleep(0.05)


def _workers(folder):
    """The process ids of those that hold prompts, as their claims say them."""
    names = _rows(folder, "SELECT DISTINCT claimed_by FROM datasets WHERE status = 'processing'")
    return [int(name.rsplit("-", 2)[1]) for (name,) in names]


def _hold(folder):
    return bool(_rows(folder, "SELECT 1 FROM datasets WHERE status = 'processing' LIMIT 1"))


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
    with Image.open(folder / "pictures" / f"{number}.png") as picture:
        seen = judge(picture)
    return (seen.colour, seen.background) == (scene.colour, scene.background)


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [40, pytest.param(400, marks=pytest.mark.scale)])
def test_every_prompt_once_though_a_worker_is_killed(tmp_path, httpserver, prompts):
    """One of several workers dies by SIGKILL in the middle: every prompt has its own picture and one result,
    the receiver is told once, the status is the run's, and Ray has seen no secret.
    """
    httpserver.expect_request("/told").respond_with_data("")
    scenes = [SCENES[number % len(SCENES)] for number in range(prompts)]
    _enqueue(tmp_path, *(scene.caption for scene in scenes))
    _rows(tmp_path, "SELECT 1")
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute("INSERT INTO datasets (_id, text) VALUES (9999, '')")
    workers = "4" if prompts == 400 else "2"
    told = ("--callback-url", httpserver.url_for("/told"), "--run-id", "night")
    with _running(
        tmp_path, *DRAWN, *told, "--workers", workers, "--batch-size", "5",
        start=product.drawing, INTERNAL_API_TOKEN=TOKEN,
    ) as process:  # fmt: skip
        _until(lambda: _completed(tmp_path) >= prompts // 5 and _workers(tmp_path), process)
        os.kill(_workers(tmp_path)[0], signal.SIGKILL)
        assert not _said_by_ray(TOKEN)
        line, _ = process.communicate(timeout=600)
    assert process.returncode == 3, _log(tmp_path)
    assert line.startswith(f"completed {prompts}, failed 1, remaining 0; ")
    assert _log(tmp_path).count(" died: ") == 1
    results = _rows(tmp_path, "SELECT dataset_id FROM dataset_records ORDER BY dataset_id")
    assert results == [(number,) for number in range(1, prompts + 1)]
    wrong = [number for number, scene in enumerate(scenes, 1) if not _shows(tmp_path, number, scene)]
    assert not wrong
    runs = _rows(tmp_path, "SELECT _id, status, completed, failed FROM runs")
    assert runs == [("night", "completed", prompts, 1)]
    ((request, _),) = httpserver.log
    body = request.get_json()
    assert (body["final"], body["counts"]) == (True, {"completed": prompts, "error": 1})


def test_a_run_that_is_killed_leaves_no_worker_and_the_next_goes_on(tmp_path):
    """SIGKILL of the run itself: its workers end by themselves; the next run makes the rest."""
    _enqueue(tmp_path, *_boats(160))
    job = ("--workers", "2", "--batch-size", "5", "--lease-seconds", "3")
    with _running(tmp_path, *job) as process:
        _until(lambda: _completed(tmp_path) >= 10 and len(_workers(tmp_path)) == 2, process)
        workers = [psutil.Process(pid) for pid in _workers(tmp_path)]
        process.kill()
    _gone, alive = psutil.wait_procs(workers, timeout=PATIENCE)
    assert not alive
    now = "strftime('%Y-%m-%dT%H:%M:%f', 'now')"
    live = f"SELECT 1 FROM datasets WHERE status = 'processing' AND lease_expires_at > {now}"  # noqa: S608
    _until(lambda: not _rows(tmp_path, live))
    before = _completed(tmp_path)
    assert 10 <= before < 160
    status, line = _finished(tmp_path, *job)
    assert (status, line.split(";")[0]) == (0, f"completed {160 - before}, failed 0, remaining 0")
    assert len(_rows(tmp_path, "SELECT dataset_id FROM dataset_records")) == 160


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_workers_and_releases_what_they_claimed(tmp_path, number, status):
    """Asked to end, alone or (as by a terminal) with its whole group, a run keeps what is finished, gives
    back the rest of all its workers, and leaves none of them behind.
    """
    _enqueue(tmp_path, *_boats(200))
    with _running(tmp_path, "--workers", "2", "--batch-size", "5") as process:
        _until(lambda: _completed(tmp_path) >= 10 and len(_workers(tmp_path)) == 2, process)
        workers = [psutil.Process(pid) for pid in _workers(tmp_path)]
        asked = time.monotonic()
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        line, _ = process.communicate(timeout=PATIENCE)
        spent = time.monotonic() - asked
    assert process.returncode == status, _log(tmp_path)
    assert spent < product.soon()
    assert not _hold(tmp_path)
    done = _completed(tmp_path)
    assert line.startswith(f"completed {done}, failed 0, remaining {200 - done}; ")
    assert 10 <= done < 200
    assert not psutil.wait_procs(workers, timeout=PATIENCE)[1]
    assert "Traceback" not in _log(tmp_path)
    assert all(row.startswith("{") for row in _log(tmp_path).splitlines())


def test_the_limit_holds_over_all_workers(tmp_path, mongodb_server):
    """Three workers, on the database that several machines share, take no more than the limit together, and
    not less.
    """
    job = ("--mongo-uri", f"{mongodb_server}/crew", "--output", "pictures")
    with MongoClient(f"{mongodb_server}/crew") as client:
        prompts = client.get_default_database().datasets
        prompts.insert_many([{"_id": number, "text": text} for number, text in enumerate(_boats(40))])
        limited = ("--workers", "3", "--batch-size", "5", "--limit", "17")
        status, line = _finished(tmp_path, *limited, job=job)
        assert (status, line.split(";")[0]) == (0, "completed 17, failed 0, remaining 23"), _log(tmp_path)
        assert prompts.count_documents({"status": "completed"}) == 17


def test_the_limit_holds_though_a_worker_dies(tmp_path):
    """The places of what it held are given to others, once: a limited run makes neither less nor all."""
    _enqueue(tmp_path, "kill", *_boats(12))
    status, line = _finished(tmp_path, "--workers", "1", "--batch-size", "2", "--limit", "5")
    assert (status, line.split(", remaining")[0]) == (0, "completed 5, failed 0"), _log(tmp_path)


def test_a_prompt_that_kills_workers_is_abandoned(tmp_path):
    """Its workers are replaced each time, its neighbours are made, and it ends as every such prompt does."""
    _enqueue(tmp_path, "kill", *_boats(12))
    status, line = _finished(tmp_path, "--workers", "2", "--batch-size", "4")
    assert (status, line.split(";")[0]) == (3, "completed 12, failed 1, remaining 0"), _log(tmp_path)
    assert _rows(tmp_path, "SELECT error_code, deaths FROM datasets WHERE _id = 1") == [("abandoned", 5)]


@pytest.mark.parametrize(("trouble", "status"), [("break one", 0), ("break all", 1)])
def test_a_run_fails_when_all_of_its_workers_have(tmp_path, trouble, status):
    """A worker whose device breaks gives back what it holds, for the others; without others the run fails."""
    _enqueue(tmp_path, trouble, *_boats(20))
    ended, line = _finished(tmp_path, "--workers", "2", "--batch-size", "4")
    assert ended == status, _log(tmp_path)
    assert "the device is broken" in _log(tmp_path)
    assert not _hold(tmp_path)
    if status == 0:
        assert line.startswith("completed 21, failed 0, remaining 0; ")


def test_without_ray_a_sentence_says_what_to_install(tmp_path):
    """Asked for workers where Ray is not installed, a run ends with status 2 and names the package."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['ray'] = None\n")
    finished = product.run(*JOB, "--workers", "2", folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert finished.returncode == 2
    (line,) = product.errors(finished)
    assert "pip install 'ray==" in line
    assert not (tmp_path / "prompts.db").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (JOB, "SQLite is a file on one machine"),
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


def _ray(*arguments, **variables):
    """Ray's own command, which leaves its processes running; what it says."""
    kept = {**product.environment(Path("/tmp"), PYTHONPATH=str(product.ROOT)), **variables}  # noqa: S108
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ray")), *arguments],
        env={**kept, "RAY_USAGE_STATS_ENABLED": "0"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return done.stdout


@pytest.fixture(scope="module")
def cluster():
    """Starts a Ray cluster of one machine: its address, and the environment of those who may join it."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    folder = tempfile.mkdtemp(prefix="t2i-")  # sockets' names must be short
    small = ("--num-cpus", "1", "--object-store-memory", "80000000")
    node = (*small, "--temp-dir", folder)
    said = _ray("start", "--head", "--port", str(free_port()), "--include-dashboard", "false", *node, **token)
    (address,) = set(re.findall(r"address='([^']+)'", said))
    yield address, token, small
    for each in psutil.process_iter(["cmdline"]):
        if any(folder in word for word in each.info["cmdline"] or []):
            each.kill()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_that_is_there_is_used_and_left_there(tmp_path, cluster):
    """With ``--ray-address`` the workers are the cluster's; afterwards it goes on. With two machines SQLite
    is refused: status 2, and nothing is claimed.
    """
    address, token, small = cluster
    _enqueue(tmp_path, *_boats(20))
    joined = ("--workers", "2", "--ray-address", address)
    status, line = _finished(tmp_path, *joined, "--limit", "10", **token)
    assert (status, line.split(";")[0]) == (0, "completed 10, failed 0, remaining 10"), _log(tmp_path)
    _ray("start", "--address", address, "--node-ip-address", "127.0.0.2", *small, **token)
    status, line = _finished(tmp_path, *joined, **token)
    assert status == 2, _log(tmp_path)
    assert "SQLite is a file on one machine" in _log(tmp_path)
    assert (_completed(tmp_path), _hold(tmp_path)) == (10, False)
