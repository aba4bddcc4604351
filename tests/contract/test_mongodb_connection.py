"""Connecting to MongoDB: what a URI means, and errors in one line that keep the password to themselves."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing

import pytest
from pymongo.errors import OperationFailure

from tests.chaos.gates import Gate, wire_message
from tests.contract.database_suite import opened
from tests.servers import free_port
from text2img.databases import Collections
from text2img.databases.mongo import session
from text2img.databases.mongo.session import address_of, error_message
from text2img.errors import ConfigurationError, DatabaseFailed


def test_without_a_path_the_database_is_text2img(mongodb_server):
    """The URI's path names the database; where it has none the job's name does."""
    connection = session.Session(mongodb_server, Collections())
    assert connection.name == "text2img"
    connection.close()


def test_a_wrong_password_is_said(mongo_stand):
    """The server's refusal at the door becomes a sentence without the password."""
    uri = mongo_stand.backend.url.replace("mongodb://", "mongodb://me:hunter2@")
    with pytest.raises(DatabaseFailed, match="rejected the user or the password") as caught:
        opened(uri)
    assert "hunter2" not in str(caught.value)


def test_an_absent_server_is_said_in_time(monkeypatch):
    """The patience is what pymongo waits, also against the URI; then one line with the address and without
    the password.
    """
    assert session.CONNECT_TIMEOUT <= 15  # of the 20 seconds that the contract allows
    monkeypatch.setattr(session, "CONNECT_TIMEOUT", 1)
    port = free_port()
    uri = f"mongodb://me:hunter2@127.0.0.1:{port}/db?serverSelectionTimeoutMS=3600000"
    with closing(session.connect(uri)) as client:
        assert client.options.server_selection_timeout == session.CONNECT_TIMEOUT
        assert client.options.pool_options.connect_timeout == session.CONNECT_TIMEOUT
    with pytest.raises(DatabaseFailed) as caught:
        opened(uri)
    assert f"MongoDB at 127.0.0.1:{port} did not respond within 1 seconds" in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("silent", [False, True])
def test_a_server_that_is_gone_does_not_hold_up_the_end(mongodb_server, monkeypatch, silent):
    """Closing does not take the patience that an absent server is given, here an hour; refused, or
    unanswered.
    """
    monkeypatch.setattr(session, "CONNECT_TIMEOUT", 3600)
    monkeypatch.setattr(session, "SOCKET_TIMEOUT", 3600)
    port = int(mongodb_server.rpartition(":")[2])
    with Gate(port, wire_message) as gate:
        database = opened(f"mongodb://127.0.0.1:{gate.port}/closing?directConnection=true")
        with gate.away(silent=silent):
            database.close()


@pytest.mark.parametrize(
    "uri",
    [
        "mongodb://",
        "mongodb://me:hunter2@",
        "mongodb://me:hunter2/more@host/db",
        "mongodb://me:hunter2:x@host:port/db",
        "mongodb://me:hunter2@host/db?tls=maybe",
        "mongodb://me:hunter2@host/a b",
        "mongodb://me:hunter2@host:99999/db",
        "mongodb+srv://me:hunter2@localhost/db",
        "mongodb://me:hunter2@host/db?authMechanism=nonsense",
    ],
)
def test_a_uri_that_cannot_be_read_is_a_configuration_error(uri):
    """Whatever is wrong with it, no piece of the password is shown."""
    with pytest.raises(ConfigurationError) as caught:
        opened(uri)
    assert "hunter2" not in str(caught.value)
    assert "MongoDB URI" in str(caught.value)


def test_refusals_say_what_to_do():
    """A wrong password and a missing right each have their own sentence."""
    wrong = OperationFailure("Authentication failed.", code=18)
    assert "rejected the user or the password" in error_message(wrong, "h", "db")
    assert "grant it readWrite" in error_message(OperationFailure("not authorized", code=13), "h", "db")
    other = OperationFailure("bad\nthing", code=1, details={"errmsg": "bad\nthing"})
    assert error_message(other, "h", "db") == "MongoDB at h, database db: bad"


def test_the_address_shows_hosts_alone():
    """Of a URI, only the hosts are shown."""
    assert address_of("mongodb://u:p@a:1,b:2/db?x=y@z") == "a:1,b:2"
    assert address_of("mongodb+srv://cluster.example.net") == "cluster.example.net"
    assert address_of("mongodb://a?tls=true") == "a"


def test_pymongo_is_imported_only_for_mongodb(tmp_path):
    """A run on SQLite never pays for pymongo."""
    program = (
        "import sys; from text2img.databases import Collections, open_database; "
        f"open_database('sqlite:///{tmp_path}/p.db', Collections()).close(); "
        "sys.exit('pymongo' in sys.modules or 'bson' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
