"""Every option, declared once: its flag, its variable, its default, what it means.

The dataclass is what the program reads; the command line is made from it, and ``environment`` fills it. It is
declared in three parts, ``places``, ``drawing`` and ``running``; here is what follows from several options at
once. Knows not what the options do, and imports little, so that ``--help`` is quick.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from text2img.errors import ConfigurationError
from text2img.prompts.batching import BatchSize
from text2img.prompts.ids import IterationFolderName, ObjectName
from text2img.prompts.parameters import RequestedParameters
from text2img.prompts.refinement import Loop
from text2img.settings.options import DEFAULT_MODEL, DEFAULTS, Option, RuntimeSettings, declared_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

__all__ = ["DATABASE_NAME", "DEFAULTS", "DEFAULT_MODEL", "Option", "Settings", "options"]

DATABASE_NAME = "text2img.db"
"""The file in an output folder that holds its database."""
_HOSTED = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*){1,7}", re.ASCII)
"""A model's name with its owner, and what of it is asked: fal-ai/flux/dev. It becomes a part of URLs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(RuntimeSettings):
    """All options with their values. Secrets stay out of ``repr``; ``secrets`` lists them for masking."""

    def __repr__(self) -> str:
        shown = {option.name: getattr(self, option.name) for option in options() if not option.secret}
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def secrets(self) -> tuple[str, ...]:
        """The values that must never be shown."""
        values = (getattr(self, option.name) for option in options() if option.secret)
        return tuple(value for value in values if value)

    @property
    def requested(self) -> RequestedParameters:
        """What the flags and variables ask of every picture."""
        return RequestedParameters(
            **{
                f.name: getattr(self, f.name)
                for f in dataclasses.fields(RequestedParameters)
                if hasattr(self, f.name)
            }
        )

    @property
    def batches(self) -> BatchSize:
        """How many prompts share a batch; raises ConfigurationError for what is no batch size."""
        try:
            return BatchSize.parse(self.batch_size)
        except ValueError:
            raise ConfigurationError(
                "--batch-size (BATCH_SIZE): it should be a whole number from 1 on, auto, or auto:N;"
                f" it is {self.batch_size[:60]!r}"
            ) from None

    @property
    def object_names(self) -> ObjectName | IterationFolderName:
        """What pictures are called; raises ConfigurationError for a template that cannot be."""
        if self.folders:
            if self.object_name != ObjectName.TEMPLATE:
                raise ConfigurationError(
                    "--object-name (OBJECT_NAME) does nothing for a layout of folders; give --layout flat, or"
                    " leave it out"
                )
            return IterationFolderName()
        try:
            return ObjectName.parse(self.object_name)
        except ValueError as exc:
            raise ConfigurationError(
                f"--object-name (OBJECT_NAME): {exc}; it is {self.object_name[:60]!r}"
            ) from None

    @property
    def folders(self) -> bool:
        """Whether each prompt gets a folder of its own, with all that is known of it."""
        return (self.layout or ("folders" if self.output_dir else "flat")) == "folders"

    @property
    def loop(self) -> Loop | None:
        """How often a prompt is drawn until it is good enough; None: once, whatever becomes of it.

        Raises ConfigurationError where nothing could say how good a picture is, or several shall be kept.
        """
        if (self.iterations, self.candidates, self.min_score) == (1, 1, None):
            return None
        if self.evaluator == "none":
            raise ConfigurationError(
                "--iterations, --candidates and --min-score need scores; say by --evaluator (EVALUATOR) who"
                " gives them"
            )
        if (self.num_images or 1) > 1:
            raise ConfigurationError(
                f"--num-images (NUM_IMAGES) is {self.num_images}, and the loop (--iterations, --candidates,"
                " --min-score) keeps one picture of a prompt; leave one of the two out"
            )
        enough = 1.0 if self.min_score is None else self.min_score
        return Loop(iterations=self.iterations, candidates=self.candidates, min_score=enough)

    @property
    def hosted_model(self) -> str | None:
        """The service's name of the model that draws, None where it is drawn here.

        Raises ConfigurationError for a generator that there is not.
        """
        if self.generator == "local":
            return None
        kind, _, model = self.generator.partition(":")
        if kind != "fal" or not _HOSTED.fullmatch(model):
            raise ConfigurationError(
                "--generator (GENERATOR): it should be local, or fal:MODEL, such as fal:fal-ai/flux/dev;"
                f" it is {self.generator[:60]!r}"
            )
        return model

    @property
    def folder(self) -> Path | None:
        """The folder for all of it, None where none was named; raises ConfigurationError for what is none."""
        if not self.output_dir:
            return None
        if "://" in self.output_dir:
            raise ConfigurationError(
                "--output-dir (OUTPUT_DIR) is a folder on this machine; for a bucket give --database,"
                " --output and --layout folders"
            )
        try:
            return Path(self.output_dir).expanduser().absolute()
        except RuntimeError:
            raise ConfigurationError(
                f"--output-dir (OUTPUT_DIR): there is no such home; it is {self.output_dir[:60]!r}"
            ) from None

    @property
    def database_url(self) -> str:
        """The database's URL; raises ConfigurationError unless exactly one was given."""
        ours = f"sqlite:///{quote(str(self.folder / DATABASE_NAME))}" if self.folder else None
        return _one_of(
            {
                "--mongo-uri (MONGO_URI)": self.mongo_uri,
                "--database (DATABASE_URL)": self.database,
                "--output-dir (OUTPUT_DIR)": ours,
            }
        )

    @property
    def output_url(self) -> str:
        """The storage's URL; raises ConfigurationError unless exactly one was given."""
        return _one_of(
            {
                "--gcs-bucket (GCS_BUCKET)": self.gcs_bucket and f"gs://{self.gcs_bucket}/generated",
                "--s3-bucket (S3_BUCKET)": self.s3_bucket and f"s3://{self.s3_bucket}/generated",
                "--output (OUTPUT_URL)": self.output,
                "--output-dir (OUTPUT_DIR)": self.output_dir,
            }
        )

    @property
    def metrics_address(self) -> tuple[str, int] | None:
        """The host and port where metrics can be asked for; raises ConfigurationError for what is none."""
        if self.metrics_port is None:
            return None
        host, _, port = self.metrics_port.rpartition(":")
        if not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) or int(port) > 65_535:
            raise ConfigurationError(
                "--metrics-port (METRICS_PORT): it should be PORT or HOST:PORT;"
                f" it is {self.metrics_port[:60]!r}"
            )
        return host.strip("[]") or "127.0.0.1", int(port)

    @property
    def broker_url(self) -> str | None:
        """RabbitMQ's URL; None where none is given. Raises ConfigurationError where two are."""
        if not (self.rabbitmq_url or self.rabbitmq_host):
            return None
        return _one_of(
            {
                "--rabbitmq-url (RABBITMQ_URL)": self.rabbitmq_url,
                "--rabbitmq-host (RABBITMQ_HOST)": self.rabbitmq_host and f"amqp://{self.rabbitmq_host}",
            }
        )


def options() -> Iterator[Option]:
    """All options, in the order of their declaration."""
    return declared_in(Settings)


def _one_of(values: Mapping[str, str | None]) -> str:
    """The one value that is given, of options by their names; ConfigurationError for none or several."""
    given = {name: value for name, value in values.items() if value}
    if len(given) > 1:
        raise ConfigurationError(f"{_listed(given, 'and')} are given; give only one of them")
    if not given:
        raise ConfigurationError(f"none of {_listed(values, 'or')} is given; give one of them")
    return next(iter(given.values()))


def _listed(names: Iterable[str], word: str) -> str:
    *first, last = names
    return f"{', '.join(first)} {word} {last}"
