"""Messages of a real RabbitMQ → prompts in a real database: acknowledged once safe, made once, none lost."""

from __future__ import annotations

import json
import logging
import threading
from contextlib import contextmanager

import pytest

from tests.chaos.gates import Gate
from tests.servers import free_port
from tests.waiting import until
from text2img.concurrency.signals import Stop
from text2img.databases import Collections, Selection, open_database
from text2img.errors import BrokerFailed, ConfigurationError, DatabaseFailed, Stopped
from text2img.intake.entries import MessageReader
from text2img.intake.rabbitmq import Broker, Consumer

HEARTBEAT = 8
"""The type of a frame that says nothing but that its sender lives (AMQP 0-9-1, 4.2.7)."""


class Desk:
    """A queue of its own, and the database that its messages go to."""

    def __init__(self, server, database):
        self.server, self.database = server, database
        self.queue = server.queue()
        self.dead = f"{self.queue}.dead"
        self.away = threading.Event()
        self.failures = 0
        self.asked = threading.Semaphore(0)

    def add(self, prompts):
        self.asked.release()
        if self.away.is_set() or self.failures:
            self.failures = max(0, self.failures - 1)
            raise DatabaseFailed("the database is away")
        self.database.runs.enqueue(prompts)

    @contextmanager
    def consuming(self, *, url=None, add=None, **options):
        broker = Broker(url or self.server.url, self.queue, self.dead, 100)
        taking_in = Consumer(broker, MessageReader(), add or self.add, Stop(), **options)
        taking_in.start()
        try:
            yield
        finally:
            taking_in.close()

    def publish(self, *messages, **properties):
        bodies = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in messages]
        self.server.publish(self.queue, *bodies, **properties)

    def prompts(self):
        return self.database.runs.counts(Selection()).pending

    def await_prompts(self, number):
        until(lambda: self.prompts() == number)


@pytest.fixture
def desk(tmp_path, rabbitmq):
    """A desk with nothing on it."""
    database = open_database(f"sqlite:///{tmp_path}/prompts.db", Collections())
    yield Desk(rabbitmq, database)
    database.close()


def message(number):
    return {"generation_id": f"g-{number}", "prompt": "a cat", "seed": number}


@contextmanager
def consumers_left(desk, number):
    """After the block the queue holds so many messages that nobody has acknowledged."""
    yield
    until(lambda: desk.server.ready(desk.queue) == number)


def test_messages_become_prompts(desk):
    """Each message is a prompt under its generation_id, and none is left in the queue."""
    with consumers_left(desk, 0), desk.consuming():
        desk.publish(*map(message, range(250)))
        desk.await_prompts(250)
    claimed = desk.database.queue.claim("w", 1, 60, Selection())
    assert [(str(prompt.claim.id), prompt.text, prompt.requested.seed) for prompt in claimed] == [
        ("g-0", "a cat", 0)
    ]


def test_what_is_delivered_twice_is_one_prompt(desk):
    """The first message of an id counts, whatever later ones say, in one batch and in two."""
    with consumers_left(desk, 0), desk.consuming():
        desk.publish(message(1), {**message(1), "seed": 99}, message(2))
        desk.await_prompts(2)
        desk.publish({**message(2), "seed": 98}, message(3))
        desk.await_prompts(3)
    claimed = desk.database.queue.claim("w", 9, 60, Selection())
    assert sorted(prompt.requested.seed for prompt in claimed) == [1, 2, 3]


def test_what_is_not_valid_becomes_a_dead_letter(desk):
    """It goes to the dead letters as it was, with the reasons in a header; its neighbours become prompts."""
    with consumers_left(desk, 0), desk.consuming():
        desk.publish(message(1), b"{", message(2), {"prompt": 7}, headers={"x-trace": "t"}, message_id="m")
        desk.await_prompts(2)
        until(lambda: desk.server.ready(desk.dead) == 2)
    (first, body), (second, other) = desk.server.taken(desk.dead)
    assert (body, json.loads(other)) == (b"{", {"prompt": 7})
    assert first.headers["x-text2img-error"].startswith("the message is not JSON")
    assert second.headers["x-text2img-error"].split("; ")[0] == "generation_id is missing"
    assert "text must be text" in second.headers["x-text2img-error"]
    assert (first.headers["x-trace"], first.message_id, first.delivery_mode) == ("t", "m", 2)


def test_nothing_is_acknowledged_before_it_is_safe(desk):
    """While the database is away messages stay the broker's: all come again when the server has gone."""
    desk.away.set()
    desk.publish(*map(message, range(5)))
    with consumers_left(desk, 5), desk.consuming():
        for _ in range(2):
            desk.asked.acquire()
        assert desk.server.ready(desk.queue) == 0  # the consumer holds them
    assert desk.prompts() == 0


def test_a_database_that_comes_back_gets_what_waited(desk):
    """No message is lost and none is a dead letter because the database was away."""
    desk.failures, pauses = 3, []

    def wait(event, seconds):
        pauses.append(seconds)
        return event.is_set()

    with consumers_left(desk, 0), desk.consuming(wait=wait):
        desk.publish(*map(message, range(5)))
        desk.await_prompts(5)
    assert pauses == [0.5, 1, 2]
    assert desk.server.ready(desk.dead) == 0


def test_the_connection_outlives_a_database_slower_than_its_heartbeat(desk, caplog):
    """A call that takes three times the heartbeat's length costs no connection, and is acknowledged: it ends
    only when six heartbeats, of which one goes out each half of that length, have passed.
    """
    beats, slow, end = threading.Semaphore(0), threading.Event(), threading.Event()

    def frame(stream):
        head = stream.read(8) if not frames else stream.read(7)
        frames.append(head)
        if len(frames) == 1:  # the protocol's name
            return head
        if head[:1] == bytes([HEARTBEAT]) and slow.is_set():
            beats.release()
        return head and head + stream.read(int.from_bytes(head[3:7], "big") + 1)

    def add(prompts):
        slow.set()
        end.wait()
        desk.add(prompts)

    frames = []
    with (
        caplog.at_level(logging.DEBUG, "text2img"),
        Gate(desk.server.port, frame) as gate,
        consumers_left(desk, 0),
    ):
        with desk.consuming(url=f"amqp://guest:guest@127.0.0.1:{gate.port}/%2F?heartbeat=2", add=add):
            desk.publish(message(1))
            slow.wait()
            for _ in range(6):
                beats.acquire()
            end.set()
            desk.await_prompts(1)
            until(lambda: "became prompts" in caplog.text)
        assert "retrying in" not in caplog.text


def test_a_queue_of_any_kind_is_used_as_it_is(desk):
    """One with arguments of its owner's, such as priorities, is consumed and not declared anew."""
    with desk.server.connection() as connection:
        connection.channel().queue_declare(desk.queue, durable=True, arguments={"x-max-priority": 3})
    with consumers_left(desk, 0), desk.consuming():
        desk.server.publish(desk.queue, json.dumps(message(1)).encode(), declare=False)
        desk.await_prompts(1)


def test_a_queue_that_was_deleted_is_made_again(desk):
    """Whoever deletes the queue under a server finds it there again, consumed."""
    with consumers_left(desk, 0), desk.consuming():
        with desk.server.connection() as connection:
            connection.channel().queue_delete(desk.queue)
        until(lambda: desk.server.ready(desk.queue) == 0)
        desk.publish(message(1))
        desk.await_prompts(1)


def test_a_broker_that_restarts_is_found_again(desk):
    """Messages from before and after its restart become prompts, those in between once."""
    with consumers_left(desk, 0), desk.consuming():
        desk.publish(message(1))
        desk.await_prompts(1)
        desk.away.set()
        desk.publish(message(2))
        desk.asked.acquire()
        desk.server.stop()
        desk.away.clear()
        desk.await_prompts(2)  # what it had taken is safe, though it can acknowledge nothing
        desk.server.start()
        desk.publish(message(3))
        desk.await_prompts(3)


def test_a_broker_that_is_not_there():
    """It is waited for for a while, then the line says where nobody answers, and nothing of the password."""
    port = free_port()
    broker = Broker(f"amqp://night:hush@127.0.0.1:{port}", "q", "q.dead", 1)
    with pytest.raises(BrokerFailed) as failed:
        Consumer(broker, MessageReader(), print, Stop()).start(timeout=0.2)
    assert str(failed.value) == (f"RabbitMQ at 127.0.0.1:{port}: Connection refused; check --rabbitmq-url")


@pytest.mark.parametrize(
    ("user", "path", "words"),
    [
        ("night:hush", "", "the user name or password is rejected"),
        ("guest:guest", "/nowhere", "virtual host"),
    ],
)
def test_a_broker_that_refuses(rabbitmq, user, path, words):
    """A wrong password or virtual host ends the start at once, with a line that says so."""
    url = rabbitmq.url.replace("guest:guest", user) + path
    with pytest.raises(BrokerFailed, match=words) as failed:
        Consumer(Broker(url, "q", "q.dead", 1), MessageReader(), print, Stop()).start()
    assert "hush" not in str(failed.value)


def test_a_stop_while_the_broker_is_awaited():
    """Asked to end, the server does not wait for the broker any longer."""
    stop = Stop()
    stop.set(15)
    broker = Broker(f"amqp://127.0.0.1:{free_port()}", "q", "q.dead", 1)
    with pytest.raises(Stopped):
        Consumer(broker, MessageReader(), print, stop).start()


@pytest.mark.parametrize(
    "url", ["http://hush@host", "host", "amqp://u:hush@host:port", "amqp://h?heartbeat=x"]
)
def test_a_url_that_cannot_be_read(url):
    """It is refused with the form that it should have, and without what it holds."""
    with pytest.raises(ConfigurationError, match="--rabbitmq-url") as refused:
        Broker(url, "q", "q.dead", 1)
    assert "hush" not in str(refused.value)


def test_a_look_at_the_broker_changes_nothing(desk):
    """A look, such as doctor's, counts what waits, and makes no queue."""
    broker = Broker(desk.server.url, desk.queue, desk.dead, 1)
    assert broker.describe_queues() == f"{desk.queue} does not exist yet; {desk.dead} does not exist yet"
    desk.publish(message(1))
    assert broker.describe_queues() == f"{desk.queue}: 1 waiting; {desk.dead} does not exist yet"
