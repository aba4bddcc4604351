"""Several workers in a Ray cluster that is there: what they share, what becomes of those that die.

One cluster serves all of these tests: a start of Ray takes longer than the runs do.
"""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from pymongo import MongoClient

from tests.acceptance import crew, product
from tests.servers import free_port


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
        timeout=product.HANG,
        check=True,
    )
    return done.stdout


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of one machine: its address, and the environment of those who may join it."""
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


@pytest.fixture
def finished(cluster, tmp_path):
    """Runs the job in the cluster: its exit status and its line."""
    address, token, _ = cluster

    def run(*arguments, **more):
        return crew.finished(tmp_path, *arguments, "--ray-address", address, **token, **more)

    return run


def test_the_limit_holds_over_all_workers(tmp_path, mongodb_server, finished):
    """Three workers, on the database that several machines share, take no more than the limit together, and
    not less.
    """
    job = ("--mongo-uri", f"{mongodb_server}/crew", "--output", "pictures")
    with MongoClient(f"{mongodb_server}/crew") as client:
        prompts = client.get_default_database().datasets
        prompts.insert_many([{"_id": number, "text": text} for number, text in enumerate(crew.boats(40))])
        limited = ("--workers", "3", "--batch-size", "5", "--limit", "17")
        status, line = finished(*limited, job=job)
        counts = line.split(";")[0]
        assert (status, counts) == (0, "completed 17, failed 0, remaining 23"), crew.log_of(tmp_path)
        assert prompts.count_documents({"status": "completed"}) == 17


def test_the_limit_holds_though_a_worker_dies(tmp_path, finished):
    """The places of what it held are given to others, once: a limited run makes neither less nor all."""
    crew.enqueue(tmp_path, "kill", *crew.boats(12))
    status, line = finished("--workers", "1", "--batch-size", "2", "--limit", "5")
    assert (status, line.split(", remaining")[0]) == (0, "completed 5, failed 0"), crew.log_of(tmp_path)


def test_a_prompt_that_kills_workers_is_abandoned(tmp_path, finished):
    """Its workers are replaced each time, its neighbours are made, and it ends as every such prompt does."""
    crew.enqueue(tmp_path, "kill", *crew.boats(12))
    status, line = finished("--workers", "2", "--batch-size", "4")
    assert (status, line.split(";")[0]) == (3, "completed 12, failed 1, remaining 0"), crew.log_of(tmp_path)
    assert crew.rows(tmp_path, "SELECT error_code, deaths FROM datasets WHERE _id = 1") == [("abandoned", 5)]


@pytest.mark.parametrize(("trouble", "status"), [("break one", 0), ("break all", 1)])
def test_a_run_fails_when_all_of_its_workers_have(tmp_path, finished, trouble, status):
    """A worker whose device breaks gives back what it holds, for the others; without others the run fails."""
    crew.enqueue(tmp_path, trouble, *crew.boats(20))
    ended, line = finished("--workers", "2", "--batch-size", "4")
    assert ended == status, crew.log_of(tmp_path)
    assert "the device is broken" in crew.log_of(tmp_path)
    assert not crew.hold(tmp_path)
    if status == 0:
        assert line.startswith("completed 21, failed 0, remaining 0; ")


def test_a_cluster_that_is_there_is_used_and_left_there(tmp_path, cluster, finished):
    """With ``--ray-address`` the workers are the cluster's; afterwards it goes on. With two machines SQLite
    is refused: status 2, and nothing is claimed. The last of these tests, since the second machine stays.
    """
    crew.enqueue(tmp_path, *crew.boats(20))
    status, line = finished("--workers", "2", "--limit", "10")
    assert (status, line.split(";")[0]) == (0, "completed 10, failed 0, remaining 10"), crew.log_of(tmp_path)
    address, token, small = cluster
    _ray("start", "--address", address, "--node-ip-address", "127.0.0.2", *small, **token)
    status, line = finished("--workers", "2")
    assert status == 2, crew.log_of(tmp_path)
    assert "SQLite is a file on one machine" in crew.log_of(tmp_path)
    assert (crew.completed(tmp_path), crew.hold(tmp_path)) == (10, False)
