"""``serve`` as its operators start it: pictures of what comes while it is up, and how it ends."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
from contextlib import closing, contextmanager

import pytest
from PIL import Image
from werkzeug import Response

from tests.acceptance import product
from tests.acceptance.product import SCENE, sleeping
from tests.servers.ack_gate import ack_gate
from tests.waiting import until
from text2img.demo.judge import judge
from text2img.demo.scenes import Scene
from text2img.images.provenance import State, inspect

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
QUICK = ("--poll-seconds", "0.5", "--log-level", "DEBUG")
COLOURS = ("red", "green", "blue", "yellow", "cyan", "purple")


class Server:
    """A running serve, its log read along."""

    def __init__(self, process):
        self._process, self.lines = process, []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stderr:
            self.lines.append(line)

    @property
    def said(self):
        return "".join(self.lines)

    def says(self, words, times=1):
        """Wait until so many of its lines hold these words."""
        until(lambda: sum(words in each for each in self.lines) >= times, ended=self._has_ended)

    def _has_ended(self):
        """What it said, once there will be no more of it."""
        return not self._reader.is_alive() and f"its log was\n{self.said[-3000:]}"

    def ends(self, number=None):
        """Its exit status, after that signal, and its output; it ends without being cut off."""
        if number is not None:
            self._process.send_signal(number)
        output = self._process.stdout.read()
        self._reader.join()
        assert product.GRACE_EXCEEDED not in self.said
        return self._process.wait(), output


@contextmanager
def serving(folder, *arguments, **variables):
    with sleeping.running("serve", *JOB, *QUICK, *arguments, folder=folder, **variables) as process:
        yield Server(process)


def message(number, **fields):
    """A backend's message: a scene's caption in two tags."""
    colour = COLOURS[number % len(COLOURS)]
    caption = [f"a large {colour} circle", "on a black background"]
    return json.dumps(
        {"generation_id": f"g-{number}", "prompt_tags": caption, "seed": number, **fields}
    ).encode()


def rows(folder, statement):
    with closing(sqlite3.connect(folder / "prompts.db", timeout=30)) as database:
        return database.execute(statement).fetchall()


def pictures(folder):
    return sorted(path.name for path in (folder / "pictures").glob("*.png"))


@pytest.fixture
def broker(rabbitmq):
    """A queue of the test's own: what serve is told of it, and the server."""
    queue = rabbitmq.queue()
    rabbitmq.publish(queue)
    return rabbitmq, queue, ("--rabbitmq-url", rabbitmq.url, "--rabbitmq-queue", queue)


def test_prompts_that_come_later_are_made(tmp_path):
    """Without a broker it looks at the database, and makes what comes with the model that it has."""
    product.add(tmp_path)
    with serving(tmp_path) as server:
        server.says('"idle"')
        product.add(tmp_path, SCENE)
        server.says("completed p-")
        server.says('"idle"', times=2)
        product.add(tmp_path, "a large green square on a white background", "a boat")
        server.says("completed p-", times=3)
        running = product.run("status", *JOB[:2], folder=tmp_path).stdout
        status, said = server.ends(signal.SIGTERM)
    assert status == 143
    assert said.startswith("completed 3, failed 0, remaining 0; ")
    assert len(pictures(tmp_path)) == 3
    assert sum('"loaded' in line for line in server.lines) == 1
    assert "  running  " in running


def test_failed_prompts_do_not_change_an_idle_servers_status(tmp_path):
    """With what came while it worked made as well, it ends when idle, and its run has ended well. A failed
    prompt's outcome says so; status 3 would have a server started again for its sake.
    """
    product.add(tmp_path, "hold")
    with serving(tmp_path, "--idle-exit", "1") as server:
        server.says("loaded")
        product.add(tmp_path, SCENE)
        with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
            database.execute("INSERT INTO datasets (_id, text) VALUES (1, '')")
        (tmp_path / "release").touch()
        status, said = server.ends()
    assert (status, said[:23]) == (0, "completed 2, failed 1, ")
    assert rows(tmp_path, "SELECT status FROM runs") == [("completed",)]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_an_idle_server(tmp_path, broker, number, status):
    """Idle, with a broker, it ends by itself, and its run is written down as stopped."""
    with serving(tmp_path, *broker[2]) as server:
        server.says("idle")
        assert server.ends(number)[0] == status
    assert rows(tmp_path, "SELECT status FROM runs") == [("stopped",)]


def test_a_signal_ends_a_busy_server(tmp_path, broker):
    """In the middle of its work it gives back what it has claimed; messages that are safe stay so."""
    rabbitmq, queue, arguments = broker
    held = {"prompt_tags": ["hold"]}
    rabbitmq.publish(queue, *(message(n, **({} if n < 4 else held)) for n in range(20)))
    with serving(tmp_path, *arguments, "--batch-size", "2") as server:
        server.says("completed g-")
        assert server.ends(signal.SIGTERM)[0] == 143
    counts = product.counts(tmp_path)
    assert set(counts) == {"completed", "pending"}
    assert sum(counts.values()) == 20
    assert counts["completed"] == len(pictures(tmp_path))


@pytest.mark.smoke
def test_messages_become_pictures(tmp_path, broker):
    """Of what a backend publishes each generation gets one picture, the broken message a reason."""
    rabbitmq, queue, arguments = broker
    rabbitmq.publish(queue, *(message(n) for n in range(6)), message(2), b"{", message(3))
    with serving(tmp_path, *arguments) as server:
        server.says("completed g-", times=6)
        rabbitmq.publish(queue, message(1), message(6))
        server.says("completed g-6")
        until(lambda: rows(tmp_path, "SELECT count(*) FROM dataset_records") == [(7,)])
        assert server.ends(signal.SIGTERM)[0] == 143
    assert pictures(tmp_path) == [f"g-{n}.png" for n in range(7)]
    assert rows(tmp_path, "SELECT DISTINCT claim_number FROM datasets") == [(1,)]
    for n in range(7):
        picture = tmp_path / "pictures" / f"g-{n}.png"
        assert inspect(picture.read_bytes()).state is State.UNSIGNED
        with Image.open(picture) as image:
            assert judge(image).shows(Scene("large", COLOURS[n % 6], "circle", "black"))
    ((properties, body),) = rabbitmq.taken(f"{queue}.dead")
    assert (body, properties.headers["x-text2img-error"][:23]) == (b"{", "the message is not JSON")
    assert rabbitmq.ready(queue) == 0


def test_killed_before_it_acknowledges(tmp_path, broker):
    """SIGKILL once messages are safe and before the broker knows: they come again, and are made once."""
    rabbitmq, queue, arguments = broker
    rabbitmq.publish(queue, *(message(n) for n in range(5)))
    brief = ("--lease-seconds", "1")
    with ack_gate(rabbitmq.port) as gate:
        url = f"amqp://guest:guest@127.0.0.1:{gate.port}"
        with serving(tmp_path, "--rabbitmq-url", url, "--rabbitmq-queue", queue, *brief) as server:
            until(gate.reached.is_set)
            assert rows(tmp_path, "SELECT count(*) FROM datasets") == [(5,)]
            assert server.ends(signal.SIGKILL)[0] == -signal.SIGKILL
    with serving(tmp_path, *arguments, *brief) as server:
        server.says("already exist")
        until(lambda: rows(tmp_path, "SELECT count(*) FROM dataset_records") == [(5,)])
        server.ends(signal.SIGTERM)
    assert rows(tmp_path, "SELECT status, count(*) FROM datasets GROUP BY status") == [("completed", 5)]
    assert len(pictures(tmp_path)) == 5
    assert rabbitmq.ready(queue) == 0


def test_a_batch_longer_than_the_heartbeat(tmp_path, broker):
    """While one batch takes many times the heartbeat's length the connection holds: it is made only once."""
    rabbitmq, queue, _ = broker
    rabbitmq.publish(queue, message(1, prompt_tags=["hold"]), message(2))
    with ack_gate(rabbitmq.port, passes=True) as gate:
        url = f"amqp://guest:guest@127.0.0.1:{gate.port}/%2F?heartbeat=1"
        job = ("--rabbitmq-url", url, "--rabbitmq-queue", queue, "--batch-size", "1")
        with serving(tmp_path, *job) as server:
            server.says("loaded")
            before = gate.heartbeats
            until(lambda: gate.heartbeats >= before + 8)  # the broker hangs up where two fail to come
            assert product.counts(tmp_path) == {"processing": 2}
            (tmp_path / "release").touch()
            server.says("completed g-", times=2)
            rabbitmq.publish(queue, message(3))
            server.says("completed g-3")
    assert "retrying in" not in server.said
    assert server.said.count('"consuming"') == 1


def test_what_is_made_is_told_while_the_server_is_up(tmp_path, httpserver):
    """A callback does not wait for a thousand outcomes nor for the server's end."""
    told = threading.Event()

    def handle(request):
        told.set()
        return Response()

    httpserver.expect_request("/told", method="POST").respond_with_handler(handle)
    product.add(tmp_path)
    with serving(tmp_path, "--callback-url", httpserver.url_for("/told")) as server:
        server.says("loaded")
        product.add(tmp_path, SCENE)
        until(told.is_set)
        assert server.ends(signal.SIGTERM)[0] == 143
    ((request, _),) = httpserver.log
    body = request.get_json()
    assert (body["status"], body["final"], body["counts"]) == ("running", False, {"completed": 1, "error": 0})


def test_what_makes_no_sense_is_refused(tmp_path):
    """A limit, two brokers, and a queue that is its own dead-letter queue each end in a line and status 2."""
    wrong = [
        (("--limit", "3"), "--limit"),
        (("--rabbitmq-url", "amqp://a", "--rabbitmq-host", "b"), "--rabbitmq-host (RABBITMQ_HOST)"),
        (
            ("--rabbitmq-host", "b", "--rabbitmq-dead-letter-queue", "image_generation"),
            "--rabbitmq-dead-letter",
        ),
        (("--rabbitmq-url", "http://b"), "--rabbitmq-url"),
    ]
    each = product.run_each([("serve", *JOB, *arguments) for arguments, _ in wrong], tmp_path)
    for (_, words), finished in zip(wrong, each, strict=True):
        assert finished.returncode == 2
        assert words in product.errors(finished)[-1]
