"""The databases that the suite is run against, each test on a fresh one."""

from __future__ import annotations

import os

import pytest
from pymongo import monitoring

from tests.contract.database_suite import MongoBackend, SqliteBackend, Stand, opened

_REAL = os.environ.get("TEXT2IMG_TEST_MONGO_URI")
_MONGO = ["secantusdb", *(["mongodb"] if _REAL else [])]


def _backend(request, kind):
    if kind == "sqlite":
        return SqliteBackend(request.getfixturevalue("tmp_path"))
    return MongoBackend(kind, _REAL if kind == "mongodb" else request.getfixturevalue("mongodb_server"))


def _stand(request):
    backend = _backend(request, request.param)
    database = opened(backend.url)
    yield Stand(backend, database)
    database.close()
    backend.remove()


@pytest.fixture(params=["sqlite", *_MONGO])
def stand(request):
    """An opened, empty database of each kind."""
    yield from _stand(request)


@pytest.fixture(params=["sqlite"])
def sqlite_stand(request):
    """An opened, empty SQLite database."""
    yield from _stand(request)


@pytest.fixture(params=_MONGO)
def mongo_stand(request):
    """An opened, empty MongoDB database."""
    yield from _stand(request)


class _Counter(monitoring.CommandListener):
    """The names of the commands sent, by clients made while it is registered."""

    def __init__(self):
        self.names = []

    def started(self, event):
        self.names.append(event.command_name)

    def succeeded(self, event):
        pass

    def failed(self, event):
        pass


@pytest.fixture
def counter():
    """Counts the commands of clients that are made from now on."""
    listener, listeners = _Counter(), monitoring._LISTENERS.command_listeners
    listeners.append(listener)
    yield listener
    listeners.remove(listener)
