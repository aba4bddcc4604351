"""MongoDB for tests: SecantusDB, which speaks its wire protocol, in a process of its own.

A real server's tests run as well when TEXT2IMG_TEST_MONGO_URI names one.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from tests.servers import free_port, running


@pytest.fixture(scope="session")
def mongodb_server(tmp_path_factory):
    """The URI of a MongoDB server of this test session, without a path, in a throwaway folder."""
    with mongodb_in(tmp_path_factory.mktemp("mongodb")) as uri:
        yield uri


@contextmanager
def mongodb_in(folder):
    """The URI of a server that keeps its data in that folder, for as long as the block lasts."""
    folder.mkdir(exist_ok=True)
    port = free_port()
    uri = f"mongodb://127.0.0.1:{port}"
    # Without --sync-on-commit a killed server loses what it has acknowledged.
    arguments = ["--port", str(port), "--storage-path", str(folder / "data"), "--sync-on-commit"]
    with (
        MongoClient(uri, serverSelectionTimeoutMS=200) as client,
        running("secantusd-py", arguments, folder, lambda: answers(client)),
    ):
        yield uri


def answers(client):
    """Whether the server of that client is up."""
    try:
        client.admin.command("ping")
    except PyMongoError:
        return False
    return True
