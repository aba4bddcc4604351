"""RabbitMQ for tests: a real server and its port mapper, processes of our own in a throwaway folder."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import pika
import pytest
from pika.exceptions import AMQPError

from tests.servers import free_port, unavailable
from tests.waiting import until

_DEBIAN = "/usr/lib/rabbitmq/bin/rabbitmq-server"  # the one in the path insists on a user of its own


class RabbitServer:
    """A server that can be stopped and started again: durable queues and persistent messages stay."""

    def __init__(self, program, folder):
        self.port = free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}"
        self._program, self._folder = program, folder
        self._environment = self._variables(free_port(), free_port())
        self._mapper = self._server = None

    def _variables(self, mapper, distribution):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RABBITMQ_")}
        folder = self._folder
        return {
            **kept,
            "HOME": str(folder),
            "ERL_EPMD_PORT": str(mapper),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(folder / "none"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none.env"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none",
        }

    def start(self):
        self._mapper = self._mapper or self._process("epmd", "-port", self._environment["ERL_EPMD_PORT"])
        self._server = self._process(self._program)
        until(lambda: self._server.poll() is not None or self._answers())
        if self._server.poll() is not None:
            unavailable(f"rabbitmq-server did not come up (exit status {self._server.poll()})")

    def stop(self):
        """In good order; SIGKILL where that takes too long."""
        _end(self._server)

    def close(self):
        self.stop()
        _end(self._mapper)

    def _process(self, *command):
        with (self._folder / "server.log").open("ab") as log:
            return subprocess.Popen(command, env=self._environment, stdout=log, stderr=subprocess.STDOUT)

    def _answers(self):
        with suppress(AMQPError, OSError), self.connection():
            return True
        return False

    def connection(self):
        return pika.BlockingConnection(pika.URLParameters(self.url))

    def queue(self):
        """A queue's name that no other test has."""
        return f"q-{secrets.token_hex(6)}"

    def publish(self, queue, *bodies, declare=True, **properties):
        """Persistent messages; acknowledged by the broker before this returns."""
        with self.connection() as connection:
            channel = connection.channel()
            channel.confirm_delivery()
            if declare:
                channel.queue_declare(queue, durable=True)
            for body in bodies:
                named = pika.BasicProperties(delivery_mode=2, **properties)
                channel.basic_publish("", queue, body, named, mandatory=True)

    def ready(self, queue):
        """How many messages wait there, without those that somebody holds; None: there is no such queue."""
        with self.connection() as connection:
            try:
                return connection.channel().queue_declare(queue, passive=True).method.message_count
            except pika.exceptions.ChannelClosedByBroker:
                return None

    def taken(self, queue):
        """All messages that wait there, taken out: (properties, body)."""
        with self.connection() as connection:
            channel, taken = connection.channel(), []
            while (got := channel.basic_get(queue, auto_ack=True))[0] is not None:
                taken.append(got[1:])
            return taken


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory):
    """A RabbitMQ of this test session."""
    with rabbitmq_in(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@contextmanager
def rabbitmq_in(folder):
    """A server that keeps its data in that folder, for as long as the block lasts."""
    program = _DEBIAN if Path(_DEBIAN).exists() else shutil.which("rabbitmq-server")
    if not program:
        unavailable("rabbitmq-server is not installed; apt-get install rabbitmq-server")
    server = RabbitServer(program, folder)
    try:
        server.start()
        yield server
    finally:
        server.close()


def _end(process):
    if process is None:
        return
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
