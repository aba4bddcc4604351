"""Options that say how a run goes about its work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from text2img.settings.generation import Drawing
from text2img.settings.option import option


@dataclass(frozen=True, slots=True, kw_only=True)
class Running(Drawing):
    """Batches, leases, patience, workers, figures, serving, logs."""

    batch_size: str = option(
        "10", "run", "prompts a batch at the most; auto or auto:N: the fastest size, found up to N (64)"
    )
    run_id: str | None = option(
        None,
        "run",
        "names the run in documents, logs and callbacks; a task of a job adds its index",
        shown="made",
    )
    max_attempts: Annotated[int, Ge(1)] = option(3, "run", "tries a prompt gets when it fails itself")
    lease_seconds: Annotated[float, Gt(0), Le(86_400)] = option(
        60, "run", "how long a silent worker keeps its prompts"
    )

    database_patience: Annotated[float, Ge(0), Le(86_400)] = option(
        60, "run", "seconds that a run goes on asking a database that has gone away"
    )
    stall_timeout: Annotated[float, Gt(0), Le(86_400)] = option(
        300, "run", "seconds without a step after which the device counts as hung and the run ends"
    )
    metrics_textfile: str | None = option(
        None, "metrics", "a .prom file for node_exporter, written anew every --metrics-seconds and at the end"
    )
    pushgateway: str | None = option(
        None, "metrics", "URL of a Prometheus Pushgateway that gets the run's metrics as often", secret=True
    )
    metrics_seconds: Annotated[float, Ge(1), Le(86_400)] = option(
        15, "metrics", "seconds between looks at the database for the metrics, and between writing them"
    )
    gpu_hour_price: Annotated[float, Ge(0), Le(1_000_000)] | None = option(
        None, "run", "dollars that an hour of the machine costs; the run then says what 1,000 images cost"
    )

    workers: Annotated[int, Ge(1), Le(10_000)] | Literal["auto"] | None = option(
        None,
        "distributed",
        "workers in processes of their own, by Ray: how many, or auto: one for each GPU, else one",
        shown="one, in this process",
    )
    ray_address: str | None = option(
        None,
        "distributed",
        "the Ray cluster that --workers work on, auto or HOST:PORT; else one is started on this machine",
    )

    rabbitmq_url: str | None = option(
        None,
        "serving",
        "amqp://… or amqps://… of a RabbitMQ whose messages become prompts; else the database is looked at",
        secret=True,
    )
    rabbitmq_host: str | None = option(None, "serving", "short for --rabbitmq-url amqp://HOST")
    rabbitmq_queue: str = option(
        "image_generation", "serving", "the queue that is consumed; made, durable, where it is not there"
    )
    rabbitmq_dead_letter_queue: str | None = option(
        None,
        "serving",
        "where messages go that are not valid, with the reason in a header",
        shown="the queue's name and .dead",
    )
    rabbitmq_prefetch: Annotated[int, Ge(1), Le(10_000)] = option(
        100, "serving", "messages that may be on their way into the database at once"
    )
    metrics_port: str | None = option(
        None,
        "serving",
        "PORT, or HOST:PORT: answers Prometheus at /metrics there; on 127.0.0.1 where no host is named",
    )
    idle_exit: Annotated[float, Gt(0), Le(10_000_000)] | None = option(
        None, "serving", "seconds without work after which the server ends, with status 0"
    )
    poll_seconds: Annotated[float, Gt(0), Le(3600)] = option(
        5, "serving", "seconds between looks at the database while it is idle, at the most; one at first"
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = option(
        "INFO", "logging", "DEBUG, INFO, WARNING or ERROR"
    )
    log_file: str | None = option(None, "logging", "a file that gets every log line as JSON as well")
    log_format: Literal["auto", "text", "json"] = option(
        "auto", "logging", "auto: for people on a terminal, JSON lines with severity elsewhere; text; json"
    )
