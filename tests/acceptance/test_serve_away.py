"""``serve`` where its broker or its database is away: for a while, or for good."""

from __future__ import annotations

import signal
import sqlite3
from contextlib import closing

import pytest

from tests.acceptance.product import sleeping
from tests.acceptance.test_serve import JOB, QUICK, message, pictures, serving
from tests.servers import free_port

PASSWORD = "hush%2Fw%C3%B6rd"


def _url(port):
    return f"amqp://night:{PASSWORD}@127.0.0.1:{port}/%2F?connection_attempts=1"


@pytest.fixture(scope="module", autouse=True)
def unanswered(tmp_path_factory):
    """A server whose broker is not there. It gives up after half a minute, in which the other tests run."""
    folder = tmp_path_factory.mktemp("unanswered")
    job = ("serve", *JOB, *QUICK, "--log-file", "said.log")
    with sleeping.running(*job, folder=folder, RABBITMQ_URL=_url(free_port())) as process:
        yield process, folder


@pytest.fixture
def broker(rabbitmq):
    """A queue of the test's own: what serve is told of it, and the server."""
    queue = rabbitmq.queue()
    rabbitmq.publish(queue)
    return rabbitmq, queue, ("--rabbitmq-url", rabbitmq.url, "--rabbitmq-queue", queue)


def test_a_broker_that_restarts_in_the_middle(tmp_path, broker):
    """The server works on what it has, finds the broker again, and makes what comes then."""
    rabbitmq, queue, arguments = broker
    rabbitmq.publish(queue, *(message(n) for n in range(12)))
    with serving(tmp_path, *arguments, "--batch-size", "2") as server:
        server.says("completed g-")
        rabbitmq.stop()
        server.says("retrying in 0.5 s")
        server.says("completed g-", times=12)
        rabbitmq.start()
        rabbitmq.publish(queue, message(12))
        server.says("completed g-12")
        assert server.ends(signal.SIGTERM)[0] == 143
    assert len(pictures(tmp_path)) == 13
    assert rabbitmq.ready(queue) == 0


def test_a_database_that_is_away(tmp_path, broker):
    """While another program keeps the file locked messages stay the broker's; then all are made."""
    rabbitmq, queue, arguments = broker
    with serving(tmp_path, *arguments) as server:
        server.says("idle")
        with closing(sqlite3.connect(tmp_path / "prompts.db", timeout=30)) as other:
            other.execute("BEGIN IMMEDIATE")
            rabbitmq.publish(queue, *(message(n) for n in range(4)))
            server.says("; retrying in ")
            assert other.execute("SELECT count(*) FROM datasets").fetchall() == [(0,)]
            other.rollback()
        server.says("completed g-", times=4)
        server.ends(signal.SIGTERM)
    assert rabbitmq.ready(queue) == 0
    assert len(pictures(tmp_path)) == 4


def test_no_password_of_the_broker_is_said(tmp_path, rabbitmq, unanswered):
    """At DEBUG, refused or unreachable, by serve and by doctor, the URL's password stays where it was put."""
    process, folder = unanswered
    said = ""
    job = (*JOB, *QUICK, "--log-file", "said.log")
    for command, port in (("serve", rabbitmq.port), ("doctor", rabbitmq.port), ("doctor", free_port())):
        finished = sleeping.run(command, *job, folder=tmp_path, RABBITMQ_URL=_url(port))
        said += finished.stdout + finished.stderr
        assert finished.returncode == 1
    said += "".join(process.communicate())
    assert process.returncode == 1
    said += (tmp_path / "said.log").read_text() + (folder / "said.log").read_text()
    assert "the user name or password is rejected" in said
    assert "Connection refused" in said
    for word in ("hush", "w%C3%B6rd", "wörd"):
        assert word not in said
