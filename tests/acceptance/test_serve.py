"""``serve`` as its operators start it: pictures of what comes while it is up, and how it ends."""

from __future__ import annotations

import json
import signal
import sqlite3
import threading
import time
from contextlib import closing, contextmanager

import pytest
from PIL import Image
from werkzeug import Response

from tests.acceptance import product
from tests.servers import free_port
from tests.servers.ack_gate import ack_gate
from text2img.demo.judge import judge
from text2img.demo.scenes import Scene

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
QUICK = ("--num-inference-steps", "4", "--poll-seconds", "0.5", "--log-level", "DEBUG")
PATIENCE = 120  # seconds until a test gives up
COLOURS = ("red", "green", "blue", "yellow", "cyan", "purple")


class Server:
    """A running serve, its log read along."""

    def __init__(self, process):
        self._process, self.lines, self._grown = process, [], threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self._process.stderr:
            with self._grown:
                self.lines.append(line)
                self._grown.notify_all()

    @property
    def said(self):
        return "".join(self.lines)

    def says(self, words, times=1):
        """Wait until so many of its lines hold these words."""
        with self._grown:
            seen = self._grown.wait_for(lambda: sum(words in each for each in self.lines) >= times, PATIENCE)
        assert seen, f"it has not said {words!r} {times} times:\n{self.said[-3000:]}"

    def ends(self, number=None):
        """Its exit status, after that signal, and its output."""
        if number is not None:
            self._process.send_signal(number)
        status = self._process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status, self._process.stdout.read()


@contextmanager
def serving(folder, *arguments, **variables):
    with product.running("serve", *JOB, *QUICK, *arguments, folder=folder, **variables) as process:
        yield Server(process)


def message(number, **fields):
    colour = COLOURS[number % len(COLOURS)]
    caption = [f"a large {colour} circle", "on a black background"]
    return json.dumps(
        {"generation_id": f"g-{number}", "prompt_tags": caption, "seed": number, **fields}
    ).encode()


def enqueue(folder, *texts):
    lines = "".join(f"{text}\n" for text in texts)
    return product.run("enqueue", *JOB[:2], "-", folder=folder, stdin=lines)


def until(true):
    """Wait for something that no line tells of."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


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


@pytest.mark.slow
def test_prompts_that_come_later_are_made(tmp_path):
    """Without a broker it looks at the database, makes what comes with the model it has, ends when idle."""
    with serving(tmp_path, "--idle-exit", "6") as server:
        server.says("loaded")
        enqueue(tmp_path, "a large red circle on a blue background")
        server.says("completed p-")
        enqueue(tmp_path, "", "a large green square on a white background", "a boat")
        server.says("completed p-", times=3)
        running = product.run("status", *JOB[:2], folder=tmp_path).stdout
        status, said = server.ends()
    assert status == 0
    assert said.startswith("completed 3, failed 0, remaining 0; ")
    assert len(pictures(tmp_path)) == 3
    assert sum('"loaded' in line for line in server.lines) == 1
    assert "  running  " in running
    assert [each for (each,) in rows(tmp_path, "SELECT status FROM runs")] == ["completed"]


@pytest.mark.slow
def test_failed_prompts_do_not_change_an_idle_servers_status(tmp_path):
    """Their outcome says so; status 3 would have a server started again for their sake."""
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute("CREATE TABLE datasets (_id NOT NULL PRIMARY KEY, text)")
        database.execute("INSERT INTO datasets VALUES (1, '')")
    with serving(tmp_path, "--idle-exit", "1") as server:
        status, said = server.ends()
    assert (status, said[:23]) == (0, "completed 0, failed 1, ")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_an_idle_server(tmp_path, broker, number, status):
    """Idle, with a broker, it ends soon, and its run is written down as stopped."""
    with serving(tmp_path, *broker[2]) as server:
        server.says("idle")
        asked = time.monotonic()
        assert server.ends(number)[0] == status
    assert time.monotonic() - asked < product.soon()
    assert rows(tmp_path, "SELECT status FROM runs") == [("stopped",)]


@pytest.mark.slow
def test_a_signal_ends_a_busy_server(tmp_path, broker):
    """In the middle of its work it gives back what it has claimed; messages that are safe stay so."""
    rabbitmq, queue, arguments = broker
    rabbitmq.publish(queue, *(message(n, num_inference_steps=60) for n in range(20)))
    with serving(tmp_path, *arguments, "--batch-size", "2") as server:
        server.says("completed g-")
        asked = time.monotonic()
        assert server.ends(signal.SIGTERM)[0] == 143
    assert time.monotonic() - asked < product.soon()
    counts = dict(rows(tmp_path, "SELECT status, count(*) FROM datasets GROUP BY status"))
    assert set(counts) == {"completed", "pending"}
    assert sum(counts.values()) == 20
    assert counts["completed"] == len(pictures(tmp_path))


@pytest.mark.slow
def test_messages_become_pictures(tmp_path, broker):
    """Of what a backend publishes each generation gets one picture, the broken message a reason."""
    rabbitmq, queue, arguments = broker
    rabbitmq.publish(queue, *(message(n) for n in range(6)), message(2), b"{", message(3))
    steps = ("--num-inference-steps", "20", "--idle-exit", "3")
    with serving(tmp_path, *arguments, *steps) as server:
        server.says("completed g-", times=6)
        rabbitmq.publish(queue, message(1), message(6))
        server.says("completed g-6")
        assert server.ends()[0] == 0
    assert pictures(tmp_path) == [f"g-{n}.png" for n in range(7)]
    assert rows(tmp_path, "SELECT DISTINCT claim_number FROM datasets") == [(1,)]
    for n in range(7):
        with Image.open(tmp_path / "pictures" / f"g-{n}.png") as picture:
            assert judge(picture).shows(Scene("large", COLOURS[n % 6], "circle", "black"))
    ((properties, body),) = rabbitmq.taken(f"{queue}.dead")
    assert (body, properties.headers["x-text2img-error"][:22]) == (b"{", "the message is no JSON")
    assert rabbitmq.ready(queue) == 0


@pytest.mark.slow
def test_killed_before_it_acknowledges(tmp_path, broker):
    """SIGKILL once messages are safe and before the broker knows: they come again, and are made once."""
    rabbitmq, queue, arguments = broker
    rabbitmq.publish(queue, *(message(n) for n in range(5)))
    with ack_gate(rabbitmq.port) as gate:
        url = f"amqp://guest:guest@127.0.0.1:{gate.port}"
        with serving(tmp_path, "--rabbitmq-url", url, "--rabbitmq-queue", queue) as server:
            assert gate.reached.wait(PATIENCE)
            assert rows(tmp_path, "SELECT count(*) FROM datasets") == [(5,)]
            assert server.ends(signal.SIGKILL)[0] == -signal.SIGKILL
    with serving(tmp_path, *arguments, "--lease-seconds", "1") as server:
        server.says("there already")
        until(lambda: rows(tmp_path, "SELECT count(*) FROM dataset_records") == [(5,)])
        server.ends(signal.SIGTERM)
    assert rows(tmp_path, "SELECT status, count(*) FROM datasets GROUP BY status") == [("completed", 5)]
    assert len(pictures(tmp_path)) == 5
    assert rabbitmq.ready(queue) == 0


@pytest.mark.slow
def test_a_broker_that_restarts_in_the_middle(tmp_path, broker):
    """The server works on what it has, finds the broker again, and makes what comes then."""
    rabbitmq, queue, arguments = broker
    rabbitmq.publish(queue, *(message(n) for n in range(12)))
    with serving(tmp_path, *arguments, "--batch-size", "2") as server:
        server.says("completed g-")
        rabbitmq.stop()
        server.says("again in 0.5 s")
        server.says("completed g-", times=12)
        rabbitmq.start()
        rabbitmq.publish(queue, message(12))
        server.says("completed g-12")
        assert server.ends(signal.SIGTERM)[0] == 143
    assert len(pictures(tmp_path)) == 13
    assert rabbitmq.ready(queue) == 0


@pytest.mark.slow
def test_a_batch_longer_than_the_heartbeat(tmp_path, broker):
    """While one batch takes many times the heartbeat's length the connection holds: it is made only once."""
    rabbitmq, queue, _ = broker
    rabbitmq.publish(queue, message(1, num_inference_steps=200), message(2, num_inference_steps=200))
    url = f"{rabbitmq.url}/%2F?heartbeat=1"
    with serving(tmp_path, "--rabbitmq-url", url, "--rabbitmq-queue", queue, "--batch-size", "1") as server:
        server.says("loaded")
        began = time.monotonic()
        server.says("completed g-", times=2)
        took = time.monotonic() - began
        rabbitmq.publish(queue, message(3))
        server.says("completed g-3")
    assert took > 5
    assert "again in" not in server.said
    assert server.said.count('"consuming"') == 1


@pytest.mark.slow
def test_a_database_that_is_away(tmp_path, broker):
    """While another program keeps the file locked messages stay the broker's; then all are made."""
    rabbitmq, queue, arguments = broker
    with serving(tmp_path, *arguments) as server:
        server.says("idle")
        with closing(sqlite3.connect(tmp_path / "prompts.db", timeout=30)) as other:
            other.execute("BEGIN IMMEDIATE")
            rabbitmq.publish(queue, *(message(n) for n in range(4)))
            server.says("messages wait for it")
            assert other.execute("SELECT count(*) FROM datasets").fetchall() == [(0,)]
            other.rollback()
        server.says("completed g-", times=4)
        server.ends(signal.SIGTERM)
    assert rabbitmq.ready(queue) == 0
    assert len(pictures(tmp_path)) == 4


@pytest.mark.slow
def test_what_is_made_is_told_while_the_server_is_up(tmp_path, httpserver):
    """A callback does not wait for a thousand outcomes nor for the server's end."""
    told = threading.Event()

    def handle(request):
        told.set()
        return Response()

    httpserver.expect_request("/told", method="POST").respond_with_handler(handle)
    with serving(tmp_path, "--callback-url", httpserver.url_for("/told")) as server:
        server.says("loaded")
        enqueue(tmp_path, "a large red circle on a blue background")
        assert told.wait(PATIENCE)
        assert server.ends(signal.SIGTERM)[0] == 143
    ((request, _),) = httpserver.log
    body = request.get_json()
    assert (body["status"], body["final"], body["counts"]) == ("running", False, {"completed": 1, "error": 0})


@pytest.mark.slow
def test_no_password_of_the_broker_is_said(tmp_path, rabbitmq):
    """At DEBUG, refused or unreachable, by serve and by doctor, the URL's password stays where it was put."""
    said = ""
    for port in (rabbitmq.port, free_port()):
        url = f"amqp://night:hush%2Fw%C3%B6rd@127.0.0.1:{port}/%2F?connection_attempts=1"
        for command in ("serve", "doctor"):
            job = (command, *JOB, *QUICK, "--log-file", "said.log")
            finished = product.run(*job, folder=tmp_path, timeout=PATIENCE, RABBITMQ_URL=url)
            said += finished.stdout + finished.stderr
            assert finished.returncode == 1
    said += (tmp_path / "said.log").read_text()
    assert "the user name or password is refused" in said
    assert "Connection refused" in said
    for word in ("hush", "w%C3%B6rd", "wörd"):
        assert word not in said


@pytest.mark.slow
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
    for arguments, words in wrong:
        finished = product.run("serve", *JOB, *arguments, folder=tmp_path)
        assert finished.returncode == 2
        assert words in product.errors(finished)[-1]
