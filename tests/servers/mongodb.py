"""MongoDB for tests: SecantusDB, which speaks its wire protocol, in a process of its own.

A real server's tests run as well when TEXT2IMG_TEST_MONGO_URI names one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from tests.servers import free_port, unavailable

_UP_IN = 20  # seconds


@pytest.fixture(scope="session")
def mongodb_server(tmp_path_factory):
    """The URI of a MongoDB server of this test session, without a path, in a throwaway folder."""
    program = Path(sys.executable).with_name("secantusd-py")
    found = str(program) if program.exists() else shutil.which("secantusd-py")
    if not found:
        unavailable("secantusdb is not installed; pip install -e '.[test]'")
    folder, port = tmp_path_factory.mktemp("mongodb"), free_port()
    with (folder / "server.log").open("wb") as log:
        # Without --sync-on-commit a killed server loses what it has acknowledged.
        process = subprocess.Popen(
            [found, "--port", str(port), "--storage-path", str(folder / "data"), "--sync-on-commit"],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            uri = f"mongodb://127.0.0.1:{port}"
            _wait_until_up(process, uri)
            yield uri
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_up(process, uri):
    end = time.monotonic() + _UP_IN
    with MongoClient(uri, serverSelectionTimeoutMS=200) as client:
        while time.monotonic() < end and process.poll() is None:
            try:
                client.admin.command("ping")
            except PyMongoError:
                continue
            return
    unavailable("secantusd-py did not come up")
