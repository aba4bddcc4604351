"""Takes a queue's messages in.

One thread holds the connection and does nothing that takes long, so that heartbeats are answered while the
device works; another reads the messages and adds their prompts. What a lost connection leaves unacknowledged
comes again, and is there already. Knows neither how messages are read nor where prompts go.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pika
from pika.exceptions import (
    AMQPError,
    ChannelClosedByBroker,
    ChannelWrongStateError,
    ConsumerCancelled,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)

from text2img.errors import BrokerFailed, ConfigurationError, DatabaseFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pika.adapters.blocking_connection import BlockingChannel

    from text2img.concurrency.signals import Stop
    from text2img.databases import NewPrompt


log = logging.getLogger(__name__)

REASON = "x-text2img-error"
"""The header of a dead letter that says what is wrong with it."""
PATIENCE = 30.0
"""Seconds in which a broker must answer when the server starts. Later it is waited for without end."""
_LONGEST_REASON = 2_000  # characters
_TOGETHER = 0.05  # seconds in which messages gather, to be added together
_TURN = 1.0  # seconds that the connection is served before a look around
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds
_LEAVING = 2.0  # seconds that a thread may take to end


@dataclass(frozen=True, slots=True)
class _Message:
    """One that was delivered, by its channel's tag; ``reasons`` why it is a dead letter, if it is one."""

    channel: BlockingChannel
    tag: int
    properties: pika.BasicProperties
    body: bytes
    reasons: Sequence[str] = ()


class Consumer:
    """Takes messages in, from ``start`` to ``close``.

    ``read``: a body's prompt, or None and what is wrong. ``add``: called with prompts, returns once they are
    safe, may be called with the same again; while it raises DatabaseFailed it is called again, for ever.
    ``wait(event, seconds)`` waits between two tries, for the event and no longer than that.
    """

    def __init__(
        self,
        broker: Broker,
        read: Callable[[bytes], tuple[NewPrompt | None, list[str]]],
        add: Callable[[list[NewPrompt]], None],
        stop: Stop,
        *,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self._broker, self._read, self._add, self._stop = broker, read, add, stop
        self._wait = wait
        self._delivered: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()
        self._consuming, self._leaving = threading.Event(), threading.Event()
        self._lost: AMQPError | OSError | None = None
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=partial(self._kept, work), name=name, daemon=True)
            for name, work in (("rabbitmq", self._hold), ("intake", self._take_in))
        ]

    def start(self, patience: float = PATIENCE) -> None:
        """See Intake.start; returns once messages may come, which may take ``patience`` seconds."""
        for thread in self._threads:
            thread.start()
        try:
            self._await_broker(time.monotonic() + patience)
        except BaseException:
            self.close()
            raise

    def _await_broker(self, until: float) -> None:
        while not self._consuming.wait(0.1):
            self._stop.check()
            self.check()
            lost = self._lost
            if lost is not None and (isinstance(lost, FATAL_ERRORS) or time.monotonic() > until):
                raise BrokerFailed(f"{self._broker.place}: {explained(lost)}; check --rabbitmq-url") from lost

    def check(self) -> None:
        """Raise what has ended a thread, if anything has: a fault of the program's own."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """See Intake.close."""
        self._leaving.set()
        self._delivered.put(None)
        for thread in self._threads:
            thread.join(_LEAVING)

    def _kept(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as exc:  # noqa: BLE001 - raised again where the server looks around
            self._failure = exc

    # The thread that holds the connection.

    def _hold(self) -> None:
        wait = _FIRST_WAIT
        while not self._leaving.is_set():
            began = time.monotonic()
            try:
                self._consume()
            except (AMQPError, OSError) as exc:
                self._lost = exc
                # At the start whoever waits for it says so, in one line.
                level = logging.WARNING if self._consuming.is_set() else logging.DEBUG
                wait = _FIRST_WAIT if time.monotonic() - began > _LONGEST_WAIT else wait
                log.log(level, "%s: %s; again in %g s", self._broker.place, explained(exc), wait)
                self._wait(self._leaving, wait)
                wait = min(wait * 2, _LONGEST_WAIT)

    def _consume(self) -> None:
        """One connection's life."""
        connection = self._broker.connect()
        try:
            for name in (self._broker.queue, self._broker.dead_letter_queue):
                self._broker.declare(connection, name)
            channel = connection.channel()
            channel.basic_qos(prefetch_count=self._broker.prefetch)
            channel.add_on_cancel_callback(_cancelled)
            channel.basic_consume(self._broker.queue, self._deliver)
            log.info(
                "consuming %s of %s", self._broker.queue, self._broker.place, extra={"event": "consuming"}
            )
            self._consuming.set()
            while not self._leaving.is_set():
                connection.process_data_events(_TURN)
                if not channel.is_open:  # which nobody is told who does not ask
                    raise ChannelWrongStateError("the broker closed the channel")
        finally:
            if connection.is_open:
                connection.close()

    def _deliver(self, channel: BlockingChannel, method: Any, properties: Any, body: bytes) -> None:
        self._delivered.put(_Message(channel, method.delivery_tag, properties, body))

    def _settle(self, messages: Sequence[_Message]) -> None:
        """Their prompts are safe: those without one become dead letters, then all are acknowledged."""
        channel = messages[-1].channel
        if not channel.is_open:
            return  # they come again, on another
        if dead := [message for message in messages if message.reasons]:
            letters = channel.connection.channel()
            letters.confirm_delivery()
            for message in dead:
                self._dead_letter(letters, message)
            letters.close()
        channel.basic_ack(messages[-1].tag, multiple=True)

    def _dead_letter(self, letters: BlockingChannel, message: _Message) -> None:
        reason = "; ".join(message.reasons)[:_LONGEST_REASON]
        properties = message.properties
        properties.headers = {**(properties.headers or {}), REASON: reason}
        properties.delivery_mode = pika.DeliveryMode.Persistent.value
        properties.expiration = None
        properties.user_id = None  # the broker wants it to be the one who publishes
        letters.basic_publish("", self._broker.dead_letter_queue, message.body, properties, mandatory=True)
        log.warning(
            "a message is not valid and goes to %s: %s",
            self._broker.dead_letter_queue,
            reason,
            extra={"event": "dead_letter"},
        )

    # The thread that reads them and adds their prompts.

    def _take_in(self) -> None:
        while messages := self._gathered():
            read = [(message, *self._read(message.body)) for message in messages]
            prompts = [prompt for _, prompt, _ in read if prompt is not None]
            if not self._added(prompts):
                return
            settled = [
                _Message(each.channel, each.tag, each.properties, each.body, reasons)
                for each, _, reasons in read
            ]
            self._requeue(settled)

    def _gathered(self) -> list[_Message]:
        """What has come, and what comes in the next moment; of one channel. Empty at the end."""
        first = self._delivered.get()
        if first is None:
            return []
        messages, until = [first], time.monotonic() + _TOGETHER
        while len(messages) < self._broker.prefetch:
            try:
                message = self._delivered.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if message is None:
                return []
            messages.append(message)
        channel = messages[-1].channel
        return [message for message in messages if message.channel is channel]  # the rest comes again

    def _added(self, prompts: list[NewPrompt]) -> bool:
        """Whether they are safe; not where the server leaves before the database answers."""
        wait = _FIRST_WAIT
        while prompts and not self._leaving.is_set():
            try:
                self._add(prompts)
            except DatabaseFailed as exc:
                log.warning("%s; %d messages wait for it, again in %g s", exc, len(prompts), wait)
                self._wait(self._leaving, wait)
                wait = min(wait * 2, _LONGEST_WAIT)
            else:
                log.debug("%d messages became prompts", len(prompts), extra={"messages": len(prompts)})
                return True
        return not self._leaving.is_set()

    def _requeue(self, messages: Sequence[_Message]) -> None:
        """Let the thread that holds the connection settle them, if it still holds it."""
        try:
            messages[-1].channel.connection.add_callback_threadsafe(partial(self._settle, messages))
        except AMQPError as exc:  # it is closed: they come again
            log.debug("not acknowledged: %s", explained(exc))


def _cancelled(frame: object) -> None:
    del frame
    raise ConsumerCancelled("the queue was deleted, or is served elsewhere from now on")


logging.getLogger("pika").setLevel(logging.CRITICAL)  # it tells of one lost connection in ten lines

FATAL_ERRORS = (ProbableAuthenticationError, ProbableAccessDeniedError, ChannelClosedByBroker)
"""What does not get better by waiting, when the server starts."""
_NOT_FOUND = 404


class Broker:
    """A RabbitMQ and the queues used there. Raises ConfigurationError for a URL that cannot be read."""

    def __init__(self, url: str, queue_name: str, dead_letter_queue: str, prefetch: int) -> None:
        self.queue, self.dead_letter_queue, self.prefetch = queue_name, dead_letter_queue, prefetch
        if queue_name == dead_letter_queue:
            raise ConfigurationError("--rabbitmq-dead-letter-queue must not be the queue that is consumed")
        if url.partition("://")[0].lower() not in {"amqp", "amqps"}:
            raise ConfigurationError(
                "--rabbitmq-url (RABBITMQ_URL): it should start with amqp:// or amqps://"
            )
        try:
            self._parameters = pika.URLParameters(url)
        except Exception:  # noqa: BLE001 - whatever it says may hold the password
            raise ConfigurationError(
                "--rabbitmq-url (RABBITMQ_URL) cannot be read; it is amqp://USER:PASSWORD@HOST:PORT/VHOST,"
                " what is special in them escaped as in every URL"
            ) from None
        if self._parameters.blocked_connection_timeout is None:
            self._parameters.blocked_connection_timeout = 60

    @property
    def place(self) -> str:
        """Where it is, without user and password."""
        return f"RabbitMQ at {self._parameters.host}:{self._parameters.port}"

    def connect(self) -> pika.BlockingConnection:
        """A new connection. Raises AMQPError or OSError."""
        return pika.BlockingConnection(self._parameters)

    def look(self) -> str:
        """What is there, left as it is. Raises BrokerFailed."""
        try:
            connection = self.connect()
            try:
                found = [self._waiting(connection, name) for name in (self.queue, self.dead_letter_queue)]
            finally:
                connection.close()
        except (AMQPError, OSError) as exc:
            raise BrokerFailed(f"{self.place}: {explained(exc)}") from exc
        return "; ".join(found)

    @staticmethod
    def _waiting(connection: pika.BlockingConnection, name: str) -> str:
        try:
            ready = connection.channel().queue_declare(name, passive=True).method.message_count
        except ChannelClosedByBroker as exc:
            if exc.reply_code != _NOT_FOUND:
                raise
            return f"{name} is not there yet"
        return f"{name}: {ready} waiting"

    def declare(self, connection: pika.BlockingConnection, name: str) -> None:
        """See that the queue is there: one that is stays as it is, whatever its kind; else a durable one."""
        try:
            connection.channel().queue_declare(name, passive=True)
        except ChannelClosedByBroker as exc:
            if exc.reply_code != _NOT_FOUND:
                raise
            connection.channel().queue_declare(name, durable=True)


def explained(exc: BaseException) -> str:
    """What went wrong with a broker, in a few words."""
    if isinstance(exc, ProbableAuthenticationError):
        return "the user name or password is refused"
    if isinstance(exc, ProbableAccessDeniedError):
        return "the user may not use that virtual host, or there is none of that name"
    inner: object = exc
    while isinstance(inner, AMQPError | OSError) and inner.args and isinstance(inner.args[0], BaseException):
        inner = inner.args[0]
    inner = getattr(inner, "exception", inner)
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    text = getattr(inner, "reply_text", "") or str(inner) or str(exc) or type(exc).__name__
    return text.splitlines()[0][:300]
