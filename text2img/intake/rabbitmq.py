"""The RabbitMQ consumer: adds the prompts of a queue's messages, then acknowledges the messages.

One thread holds the connection and does no slow work, so that it answers heartbeats while the device is busy.
Another parses the messages and adds their prompts. If the connection is lost, unacknowledged messages are
delivered again, and their prompts exist already.
"""

from __future__ import annotations

import logging
import queue
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import pika
import pika.frame
import pika.spec
from pika.exceptions import (
    AMQPError,
    ChannelClosedByBroker,
    ChannelWrongStateError,
    ConsumerCancelled,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)

from text2img.errors import BrokerFailed, ConfigurationError, DatabaseFailed, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pika.adapters.blocking_connection import BlockingChannel

    from text2img.concurrency.signals import Stop
    from text2img.databases import NewPrompt


log = logging.getLogger(__name__)

_T = TypeVar("_T")

REASON_HEADER = "x-text2img-error"
"""The header of a dead letter with its errors."""
START_TIMEOUT = 30.0
"""The seconds in which a broker must answer when the server starts. Later the retries never end."""
_MAX_REASON_BYTES = 2_000
_MAX_FRAME_BYTES = 4_096
"""A dead letter's header frame is no longer: every broker accepts this much (AMQP 0-9-1, frame-min-size)."""
_ROUTING_HEADERS = (
    *("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-count"),
    *("x-delay", "x-received-from", "x-shovelled", "x-stream-", "x-opt-", REASON_HEADER),
)
"""The beginnings of headers that a broker or its plugins act upon, or write themselves; beside CC and BCC."""
_KEPT_PROPERTIES = (
    *("content_type", "content_encoding", "priority", "correlation_id", "message_id", "timestamp"),
    *("type", "app_id"),
)
"""The properties of a dead letter that its message had; the others expire it, or ask for an answer."""
_PROMPT_ERRORS = (PromptFailed, ValueError, TypeError, ArithmeticError, LookupError, RecursionError)
"""Errors of a database that are due to one prompt, which it cannot store."""
_BATCH_WINDOW = 0.05  # seconds in which messages are collected, to be added together
_POLL_INTERVAL = 1.0  # seconds between checks whether the consumer is closing
_MIN_BACKOFF, _MAX_BACKOFF = 0.5, 30.0  # seconds
_JOIN_TIMEOUT = 2.0  # seconds that a thread may take to end


@dataclass(frozen=True, slots=True)
class _Message:
    """A delivered message; ``tag`` identifies it on its channel.

    It becomes the ``prompt``, or a dead letter because of the ``reasons``.
    """

    channel: BlockingChannel
    tag: int
    properties: pika.BasicProperties
    body: bytes
    prompt: NewPrompt | None = None
    reasons: Sequence[str] = ()


class Consumer:
    """A consumer of messages, from ``start`` to ``close``.

    ``read`` returns a body's prompt, or None and the errors. ``add`` stores prompts and returns once they are
    safe; what it returns are reasons to reject some of them, by position. ``reject`` gets the body and the
    reasons of each dead letter before it becomes one. Both may be called with the same messages again, and
    are retried without end while they raise DatabaseFailed. ``wait(event, seconds)`` waits between retries,
    for the event or that long.
    """

    def __init__(  # noqa: PLR0913 - one of them waits
        self,
        broker: Broker,
        read: Callable[[bytes], tuple[NewPrompt | None, list[str]]],
        add: Callable[[list[NewPrompt]], Mapping[int, str] | None],
        stop: Stop,
        *,
        reject: Callable[[bytes, Sequence[str]], None] | None = None,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self._broker, self._read, self._add, self._stop = broker, read, add, stop
        self._wait, self._reject = wait, reject
        self._delivered: queue.SimpleQueue[_Message | None] = queue.SimpleQueue()
        self._consuming, self._closing = threading.Event(), threading.Event()
        self._connection_error: AMQPError | OSError | None = None
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=partial(self._run_thread, work), name=name, daemon=True)
            for name, work in (("rabbitmq", self._hold_connection), ("intake", self._process_messages))
        ]

    def start(self, timeout: float = START_TIMEOUT) -> None:
        """Start consuming within ``timeout`` seconds, or raise BrokerFailed; see Intake.start."""
        for thread in self._threads:
            thread.start()
        try:
            self._await_broker(time.monotonic() + timeout)
        except BaseException:
            self.close()
            raise

    def _await_broker(self, deadline: float) -> None:
        while not self._consuming.wait(0.1):
            self._stop.check()
            self.check()
            error = self._connection_error
            if error is not None and (isinstance(error, FATAL_ERRORS) or time.monotonic() > deadline):
                reason = f"{self._broker.address}: {describe_error(error)}"
                raise BrokerFailed(f"{reason}; check --rabbitmq-url") from error

    def check(self) -> None:
        """Raise the error that ended a thread, if any: a bug."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Stop consuming; see Intake.close."""
        self._closing.set()
        self._delivered.put(None)
        for thread in self._threads:
            thread.join(_JOIN_TIMEOUT)

    def _run_thread(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as exc:  # noqa: BLE001 - check() raises it in the server's thread
            self._failure = exc

    # The thread that holds the connection.

    def _hold_connection(self) -> None:
        wait = _MIN_BACKOFF
        while not self._closing.is_set():
            started = time.monotonic()
            try:
                self._consume()
            except (AMQPError, OSError) as exc:
                self._connection_error = exc
                # At the start, start() reports the error in one line.
                level = logging.WARNING if self._consuming.is_set() else logging.DEBUG
                wait = _MIN_BACKOFF if time.monotonic() - started > _MAX_BACKOFF else wait
                reason = describe_error(exc)
                log.log(level, "%s: %s; retrying in %g s", self._broker.address, reason, wait)
                self._wait(self._closing, wait)
                wait = min(wait * 2, _MAX_BACKOFF)

    def _consume(self) -> None:
        """Connect and consume until the connection fails or the consumer closes."""
        connection = self._broker.connect()
        try:
            for name in (self._broker.queue, self._broker.dead_letter_queue):
                self._broker.declare(connection, name)
            channel = connection.channel()
            channel.basic_qos(prefetch_count=self._broker.prefetch)
            channel.add_on_cancel_callback(_on_cancel)
            channel.basic_consume(self._broker.queue, self._deliver)
            log.info(
                "consuming %s of %s", self._broker.queue, self._broker.address, extra={"event": "consuming"}
            )
            self._consuming.set()
            while not self._closing.is_set():
                connection.process_data_events(_POLL_INTERVAL)
                if not channel.is_open:  # pika does not report it otherwise
                    raise ChannelWrongStateError("the broker closed the channel")
        finally:
            if connection.is_open:
                connection.close()

    def _deliver(self, channel: BlockingChannel, method: Any, properties: Any, body: bytes) -> None:
        self._delivered.put(_Message(channel, method.delivery_tag, properties, body))

    def _acknowledge(self, messages: Sequence[_Message]) -> None:
        """Acknowledge the messages whose prompts are safe, then each invalid one as a dead letter."""
        channel = messages[-1].channel
        if not channel.is_open:
            return  # they are delivered again, on another channel
        invalid = [message for message in messages if message.reasons]
        if not invalid:
            channel.basic_ack(messages[-1].tag, multiple=True)
            return
        for message in messages:
            if not message.reasons:
                channel.basic_ack(message.tag)
        dead_letters = channel.connection.channel()
        dead_letters.confirm_delivery()
        for message in invalid:
            self._dead_letter(dead_letters, message)
            channel.basic_ack(message.tag)
        dead_letters.close()

    def _dead_letter(self, dead_letters: BlockingChannel, message: _Message) -> None:
        # A reason quotes a message, whose text may be no valid UTF-8.
        reason = "; ".join(message.reasons).encode("utf-8", "backslashreplace")
        shown = reason[:_MAX_REASON_BYTES].decode("utf-8", "ignore")
        properties = _dead_letter_properties(message.properties, shown, len(message.body))
        name = self._broker.dead_letter_queue
        dead_letters.basic_publish("", name, message.body, properties, mandatory=True)
        log.warning(
            "moved an invalid message to %s: %s",
            name,
            shown,
            extra={"event": "dead_letter"},
        )

    # The thread that parses messages and adds their prompts.

    def _process_messages(self) -> None:
        while messages := self._next_batch():
            read = [self._parsed(message) for message in messages]
            try:
                added = self._added(read)
            except _PROMPT_ERRORS:
                alone = [self._added_alone(message) for message in read]
                added = [message for message in alone if message is not None]
            if added is None or len(added) < len(read) or not self._rejected(added):
                return
            self._schedule_acknowledge(added)

    def _parsed(self, message: _Message) -> _Message:
        prompt, reasons = self._read(message.body)
        return replace(message, prompt=prompt, reasons=reasons)

    def _added(self, messages: list[_Message]) -> list[_Message] | None:
        """Return the messages, with a reason if they are rejected; None if the consumer closes."""
        prompts = [message.prompt for message in messages if message.prompt is not None]
        rejections = self._add_with_retries(prompts)
        if rejections is None:
            return None
        positions = [position for position, message in enumerate(messages) if message.prompt is not None]
        reasons = {positions[number]: reason for number, reason in rejections.items()}
        return [
            replace(message, reasons=[reasons[position]]) if position in reasons else message
            for position, message in enumerate(messages)
        ]

    def _rejected(self, messages: list[_Message]) -> bool:
        """Report those that are rejected; return False if the consumer closes before that is done."""
        for message in messages:
            if not message.reasons:
                continue
            try:
                if not self._with_retries(partial(self._report, message)):
                    return False
            except _PROMPT_ERRORS as exc:
                log.warning("the sender of a dead letter cannot be notified (%s)", type(exc).__name__)
        return True

    def _report(self, message: _Message) -> bool:
        if self._reject is not None:
            self._reject(message.body, message.reasons)
        return True

    def _added_alone(self, message: _Message) -> _Message | None:
        """Return the message, with a reason if its prompt cannot be added; None if the consumer closes."""
        if message.prompt is None:
            return message
        try:
            added = self._added([message])
            return added[0] if added else None
        except PromptFailed as exc:
            return replace(message, reasons=[str(exc)])
        except _PROMPT_ERRORS as exc:
            return replace(message, reasons=[f"the database cannot store it ({type(exc).__name__})"])

    def _next_batch(self) -> list[_Message]:
        """Return the waiting messages and those of the next moment, of one channel; empty at the end."""
        first = self._delivered.get()
        if first is None:
            return []
        messages, deadline = [first], time.monotonic() + _BATCH_WINDOW
        while len(messages) < self._broker.prefetch:
            try:
                message = self._delivered.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if message is None:
                return []
            messages.append(message)
        channel = messages[-1].channel
        # Messages of an earlier channel are delivered again.
        return [message for message in messages if message.channel is channel]

    def _add_with_retries(self, prompts: list[NewPrompt]) -> Mapping[int, str] | None:
        """Add the prompts, and return why some are rejected; None if the consumer closes before that."""
        if not prompts:
            return None if self._closing.is_set() else {}
        rejections = self._with_retries(lambda: self._add(prompts) or {})
        if rejections is not None:
            log.debug(
                "%d messages became prompts", len(prompts) - len(rejections), extra={"messages": len(prompts)}
            )
        return rejections

    def _with_retries(self, call: Callable[[], _T]) -> _T | None:
        """Return what the call returns once the database answers; None if the consumer closes before that."""
        wait = _MIN_BACKOFF
        while not self._closing.is_set():
            try:
                return call()
            except DatabaseFailed as exc:
                log.warning("%s; retrying in %g s", exc, wait)
                self._wait(self._closing, wait)
                wait = min(wait * 2, _MAX_BACKOFF)
        return None

    def _schedule_acknowledge(self, messages: Sequence[_Message]) -> None:
        """Have the connection's thread acknowledge the messages, if the connection is still open."""
        try:
            messages[-1].channel.connection.add_callback_threadsafe(partial(self._acknowledge, messages))
        except AMQPError as exc:  # it is closed: they are delivered again
            log.debug("not acknowledged: %s", describe_error(exc))


class _Properties(pika.BasicProperties):  # type: ignore[misc]
    """The properties of a message from the broker, without the headers where pika cannot decode these.

    A timestamp after the year 9999, a NaN or deep nesting would otherwise end the connection, and the next
    one, since the broker delivers the message again. The job does not read the headers.
    """

    def decode(self, encoded: bytes, offset: int = 0) -> Any:
        """Decode as pika does. Never raises."""
        try:
            return super().decode(encoded, offset)
        except Exception:  # noqa: BLE001 - whatever pika raises, the message has to be acknowledged
            log.debug("a message's headers cannot be decoded; they are ignored")
        with suppress(Exception):
            super().decode(_without_headers(encoded[offset:]))
        return self


pika.spec.props[pika.BasicProperties.INDEX] = _Properties
"""pika decodes each message's properties with the class in this table, and has no other hook for that."""


def _without_headers(encoded: bytes) -> bytes:
    """Return encoded properties without the headers: these follow the content's type and encoding."""
    (flags,) = struct.unpack_from(">H", encoded)
    start = 2
    for flag in (pika.BasicProperties.FLAG_CONTENT_TYPE, pika.BasicProperties.FLAG_CONTENT_ENCODING):
        if flags & flag:
            start += 1 + encoded[start]
    end = start + 4 + int.from_bytes(encoded[start : start + 4], "big")
    flags &= ~pika.BasicProperties.FLAG_HEADERS
    return struct.pack(">H", flags) + encoded[2:start] + encoded[end:]


def _dead_letter_properties(
    properties: pika.BasicProperties, reason: str, body_size: int
) -> pika.BasicProperties:
    """Return the properties of a dead letter, which fit a frame: without the sender's if they do not."""
    sent = {name: getattr(properties, name) for name in _KEPT_PROPERTIES}
    ours = {REASON_HEADER: reason}
    candidates: list[tuple[dict[str, Any], dict[str, str]]] = [
        (sent, {**_kept_headers(properties.headers), **ours}),
        (sent, ours),
    ]
    for fields, headers in candidates:
        made = _persistent(fields, headers)
        try:
            frame = pika.frame.Header(1, body_size, made).marshal()
        except Exception:  # noqa: BLE001, S112 - what a sender wrote and pika cannot encode is left out
            continue
        if len(frame) <= _MAX_FRAME_BYTES:
            return made
    return _persistent({}, ours)


def _persistent(fields: dict[str, Any], headers: dict[str, str]) -> pika.BasicProperties:
    return pika.BasicProperties(**fields, headers=headers, delivery_mode=pika.DeliveryMode.Persistent.value)


def _kept_headers(headers: object) -> dict[str, str]:
    """Return the sender's own headers: texts, such as a trace's id, that no broker acts upon."""
    kept = {}
    for name, value in headers.items() if isinstance(headers, dict) else ():
        if isinstance(name, str) and isinstance(value, str):
            lower = name.lower()
            if lower not in {"cc", "bcc"} and not lower.startswith(_ROUTING_HEADERS):
                kept[name] = value
    return kept


def _on_cancel(frame: object) -> None:
    del frame
    raise ConsumerCancelled("the queue was deleted or moved to another node")


logging.getLogger("pika").setLevel(logging.CRITICAL)  # it logs ten lines for one lost connection

FATAL_ERRORS = (ProbableAuthenticationError, ProbableAccessDeniedError, ChannelClosedByBroker)
"""Errors that are not retried when the server starts."""
_NOT_FOUND = 404


class Broker:
    """A RabbitMQ server and its queues. Raises ConfigurationError for an invalid URL."""

    def __init__(self, url: str, queue_name: str, dead_letter_queue: str, prefetch: int) -> None:
        self.queue, self.dead_letter_queue, self.prefetch = queue_name, dead_letter_queue, prefetch
        if queue_name == dead_letter_queue:
            raise ConfigurationError("--rabbitmq-dead-letter-queue must differ from --rabbitmq-queue")
        if url.partition("://")[0].lower() not in {"amqp", "amqps"}:
            raise ConfigurationError("--rabbitmq-url (RABBITMQ_URL) must start with amqp:// or amqps://")
        try:
            self._parameters = pika.URLParameters(url)
        except Exception:  # noqa: BLE001 - its message may contain the password
            raise ConfigurationError(
                "--rabbitmq-url (RABBITMQ_URL) is invalid; write amqp://USER:PASSWORD@HOST:PORT/VHOST, with"
                " special characters percent-encoded"
            ) from None
        if self._parameters.blocked_connection_timeout is None:
            self._parameters.blocked_connection_timeout = 60

    @property
    def address(self) -> str:
        """The server's address, without user and password."""
        return f"RabbitMQ at {self._parameters.host}:{self._parameters.port}"

    def connect(self) -> pika.BlockingConnection:
        """Open a new connection. Raises AMQPError or OSError."""
        return pika.BlockingConnection(self._parameters)

    def describe_queues(self) -> str:
        """Describe the queues' state, without changing it. Raises BrokerFailed."""
        names = (self.queue, self.dead_letter_queue)
        try:
            connection = self.connect()
            try:
                queues = [self._describe_queue(connection, name) for name in names]
            finally:
                connection.close()
        except (AMQPError, OSError) as exc:
            raise BrokerFailed(f"{self.address}: {describe_error(exc)}") from exc
        return "; ".join(queues)

    @staticmethod
    def _describe_queue(connection: pika.BlockingConnection, name: str) -> str:
        try:
            ready = connection.channel().queue_declare(name, passive=True).method.message_count
        except ChannelClosedByBroker as exc:
            if exc.reply_code != _NOT_FOUND:
                raise
            return f"{name} does not exist yet"
        return f"{name}: {ready} waiting"

    def declare(self, connection: pika.BlockingConnection, name: str) -> None:
        """Create a durable queue unless one exists, of whatever kind, which is left unchanged."""
        try:
            connection.channel().queue_declare(name, passive=True)
        except ChannelClosedByBroker as exc:
            if exc.reply_code != _NOT_FOUND:
                raise
            connection.channel().queue_declare(name, durable=True)


def describe_error(exc: BaseException) -> str:
    """Describe a broker's error in a few words."""
    if isinstance(exc, ProbableAuthenticationError):
        return "the user name or password is rejected"
    if isinstance(exc, ProbableAccessDeniedError):
        return "the virtual host does not exist, or the user may not use it"
    inner: object = exc
    while isinstance(inner, AMQPError | OSError) and inner.args and isinstance(inner.args[0], BaseException):
        inner = inner.args[0]
    inner = getattr(inner, "exception", inner)
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    text = getattr(inner, "reply_text", "") or str(inner) or str(exc) or type(exc).__name__
    return text.splitlines()[0][:300]
