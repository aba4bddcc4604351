"""A RabbitMQ and its two queues: reached, looked at, made where they are not there. Knows no prompt."""

from __future__ import annotations

import logging

import pika
from pika.exceptions import (
    AMQPError,
    ChannelClosedByBroker,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)

from text2img.errors import BrokerFailed, ConfigurationError

logging.getLogger("pika").setLevel(logging.CRITICAL)  # it tells of one lost connection in ten lines

HOPELESS = (ProbableAuthenticationError, ProbableAccessDeniedError, ChannelClosedByBroker)
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
