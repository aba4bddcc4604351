"""``serve`` with a broker, killed or with its broker restarted, and a run whose database server is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from pymongo import MongoClient

from tests.chaos.faults import finish
from tests.chaos.listener import Listener
from tests.chaos.sites import FileSite, WireSite
from tests.chaos.triggers import holding
from tests.chaos.workers import BATCH, Worker
from tests.servers import free_port
from tests.servers.ack_gate import ack_gate
from tests.servers.mongodb import answers
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class Point:
    """A point with parts of its own: ``site(folder, servers)`` opens its site, and
    ``attempt(site, book, number)`` kills, finishes, checks what only it can, and returns the ``kills``.
    """

    site: Callable
    attempt: Callable


class ServeSite(FileSite):
    """A SQLite file and a folder, with a queue of a broker: its workers are servers."""

    def __init__(self, folder, listener, rabbitmq):
        super().__init__(folder, listener)
        self.rabbitmq, self.queue = rabbitmq, rabbitmq.queue()
        rabbitmq.publish(self.queue)
        named = ("--rabbitmq-url", rabbitmq.url, "--rabbitmq-queue", self.queue)
        self.arguments = ["serve", *self.arguments, *named, "--poll-seconds", "0.5"]

    def publish(self, prompts):
        """Send a message for each prompt, as a backend does."""
        for each in prompts:
            said = {"generation_id": each["_id"], "prompt_tags": [each["text"]], "seed": each["seed"]}
            self.rabbitmq.publish(self.queue, json.dumps(said).encode())

    def finish(self, prompts):
        """Serve until all are completed and their messages acknowledged; then ask it to end."""
        until(self.leases_over)
        self.end_leases("callbacks")
        with Worker(self, "last") as server:
            server.reaches(lambda: self.count("completed") == prompts)
            server.reaches(lambda: self.rabbitmq.ready(self.queue) == 0 and '"idle"' in server.text)
            assert server.asked_to_end(signal.SIGTERM) == 128 + signal.SIGTERM, server.text[-3000:]
        assert self.rabbitmq.ready(self.queue) == 0  # nor was any held without being acknowledged
        assert not self.rabbitmq.ready(f"{self.queue}.dead")


@contextmanager
def _serve_site(folder, servers):
    with Listener() as listener:
        yield ServeSite(folder, listener, servers.rabbitmq)


def _die_accepting(site, book, number):
    """The server has messages, and is in the midst of storing them."""
    site.publish(book.prompts(range(3 * BATCH)))
    with (
        holding(site.file, "BEFORE INSERT ON datasets", 1 + number % BATCH) as sight,
        Worker(site, "killed") as server,
    ):
        server.reaches(sight.is_set)
        server.kill()
    assert site.documents("datasets") == []
    site.finish(3 * BATCH)
    return {"kills": 1}


def _die_acknowledging(site, book, number):
    """The server has stored the messages, and the broker does not know yet: they come again."""
    site.publish(book.prompts(range(3 * BATCH)))
    with ack_gate(site.rabbitmq.port) as gate:
        behind = ("--rabbitmq-url", f"amqp://guest:guest@127.0.0.1:{gate.port}")
        with Worker(site, "killed", *behind, holds=1) as server:
            server.reaches(gate.reached.is_set)
            server.kill()
    site.go()
    site.finish(3 * BATCH)
    return {"kills": 1}


def _die_drawing(site, book, number):
    """The server has a batch on the device, and further messages come while it is dead."""
    site.publish(book.prompts(range(2 * BATCH)))
    with Worker(site, "killed", holds=1 + number % 2) as server:
        server.reaches(lambda: site.on_device() and site.count("completed") == number % 2 * BATCH)
        server.kill()
    site.publish(book.prompts(range(2 * BATCH, 3 * BATCH)))
    site.go()
    site.finish(3 * BATCH)
    return {"kills": 1}


def _broker_restarts(site, book, number):
    """The broker ends and comes back while a batch is on the device, and has news for the server then."""
    site.publish(book.prompts(range(2 * BATCH)))
    with Worker(site, "patient", holds=1 + number % 2) as server:
        server.reaches(site.on_device)
        site.rabbitmq.stop()
        server.reaches(lambda: "retrying in 0.5 s" in server.text)
        site.go()
        site.rabbitmq.start()
        site.publish(book.prompts(range(2 * BATCH, 3 * BATCH)))
        server.reaches(lambda: site.count("completed") == 3 * BATCH)
        assert server.asked_to_end(signal.SIGTERM) == 128 + signal.SIGTERM, server.text[-3000:]
    site.finish(3 * BATCH)
    return {"kills": 1}


class MortalMongo:
    """A MongoDB server (SecantusDB) that can be killed and started again on its data."""

    def __init__(self, folder):
        self.port = free_port()
        self._folder, self._process = folder, None
        folder.mkdir(parents=True)

    def start(self):
        program = Path(sys.executable).with_name("secantusd-py")
        named = ("--port", str(self.port), "--storage-path", str(self._folder / "data"), "--sync-on-commit")
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen([program, *named], stdout=log, stderr=subprocess.STDOUT)
        with MongoClient(port=self.port, serverSelectionTimeoutMS=200) as client:
            until(lambda: answers(client), self._process.poll)

    def kill(self):
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc):
        self.kill()


@contextmanager
def _mortal_site(folder, servers):
    """A site whose database server is its own; no gate stands before it."""
    with (
        Listener() as listener,
        MortalMongo(folder / "mongodb") as server,
        MongoClient(port=server.port, tz_aware=True) as client,
    ):
        wire = SimpleNamespace(
            client=client, gcs=servers.wire.gcs, mongodb=server, bucket=servers.wire.bucket
        )
        yield WireSite(folder / "site", listener, wire)


def _database_dies(site, book, number):
    """The server is killed while a batch is on the device and another is on its way to it, and started again
    once the run has missed it: the run goes on and ends well by itself.
    """
    site.add(book.prompts(range(4 * BATCH)))
    with Worker(site, "patient", "--lease-seconds", "60", holds=1 + number % 3) as worker:
        worker.reaches(lambda: site.on_device() and site.count("completed") == number % 3 * BATCH)
        site.mongodb.kill()
        site.go()
        worker.reaches(lambda: "retrying in " in worker.text)
        site.mongodb.start()
        assert worker.wait() == 0, worker.text[-3000:]
    finish(site)
    return {"kills": 1}


POINTS = {
    "serve, before its messages are stored, SQLite": Point(_serve_site, _die_accepting),
    "serve, stored and not acknowledged, SQLite": Point(_serve_site, _die_acknowledging),
    "serve, while it draws, SQLite": Point(_serve_site, _die_drawing),
    "the broker restarts, SQLite": Point(_serve_site, _broker_restarts),
    "the database server is killed and restarted": Point(_mortal_site, _database_dies),
}
