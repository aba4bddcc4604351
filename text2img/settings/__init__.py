"""Settings: every option of a run, and the values that follow from several options at once.

``options`` declares the options, from which the command line is made; ``loader`` fills them from flags and
environment. This module imports little, so that ``--help`` is fast.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from text2img.errors import ConfigurationError
from text2img.prompts import Limits
from text2img.prompts.batching import BatchSize
from text2img.prompts.ids import IterationFolderName, ObjectName
from text2img.prompts.parameters import RequestedParameters
from text2img.prompts.refinement import Loop
from text2img.settings.options import DEFAULT_MODEL, DEFAULTS, Option, RuntimeSettings, declared_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping


__all__ = ["DATABASE_NAME", "DEFAULTS", "DEFAULT_MODEL", "Option", "Settings", "options"]

DATABASE_NAME = "text2img.db"
"""The database file in an output folder."""
_HOSTED_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*){1,7}", re.ASCII)
"""A hosted model's owner, name and variant, such as fal-ai/flux/dev. It becomes a part of URLs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings(RuntimeSettings):
    """All options with their values. ``repr`` shows no secrets; ``secrets`` lists them for masking."""

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
        """The parameters that flags and variables request for every image."""
        return RequestedParameters(
            **{
                parameter.name: getattr(self, parameter.name)
                for parameter in dataclasses.fields(RequestedParameters)
                if hasattr(self, parameter.name)
            }
        )

    @property
    def limits(self) -> Limits:
        """The limits on what one prompt may request."""
        return Limits(self.max_pixels, self.max_steps, self.max_images, self.max_work)

    @property
    def batches(self) -> BatchSize:
        """The batch size; raises ConfigurationError for an invalid one."""
        try:
            return BatchSize.parse(self.batch_size)
        except ValueError:
            raise ConfigurationError(
                "--batch-size (BATCH_SIZE) must be a whole number from 1, auto, or auto:N;"
                f" it is {self.batch_size[:60]!r}"
            ) from None

    @property
    def object_names(self) -> ObjectName | IterationFolderName:
        """The naming scheme of image files; raises ConfigurationError for an invalid template."""
        if self.folders:
            if self.object_name != ObjectName.TEMPLATE:
                raise ConfigurationError(
                    "--object-name (OBJECT_NAME) has no effect with --layout folders; use --layout flat, or"
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
        """True if each prompt gets its own folder, with its iterations and metadata."""
        return (self.layout or ("folders" if self.output_dir else "flat")) == "folders"

    @property
    def loop(self) -> Loop | None:
        """The refinement loop of each prompt; None if each prompt is generated once, whatever its score.

        Raises ConfigurationError if there is no evaluator to score images, or ``num_images`` is above 1.
        """
        if (self.iterations, self.candidates, self.min_score) == (1, 1, None):
            return None
        if self.evaluator == "none":
            raise ConfigurationError(
                "--iterations, --candidates and --min-score need scores; choose an evaluator with"
                " --evaluator (EVALUATOR)"
            )
        if (self.num_images or 1) > 1:
            raise ConfigurationError(
                f"--num-images (NUM_IMAGES) is {self.num_images}, but the loop (--iterations, --candidates,"
                " --min-score) keeps one image of each prompt; leave one of the two out"
            )
        min_score = 1.0 if self.min_score is None else self.min_score
        return Loop(iterations=self.iterations, candidates=self.candidates, min_score=min_score)

    @property
    def hosted_model(self) -> str | None:
        """The name of the hosted model that generates, None for a local model.

        Raises ConfigurationError for an unknown generator.
        """
        if self.generator == "local":
            return None
        kind, _, model = self.generator.partition(":")
        if kind != "fal" or not _HOSTED_MODEL.fullmatch(model):
            raise ConfigurationError(
                "--generator (GENERATOR) must be local, or fal:MODEL, such as fal:fal-ai/flux/dev;"
                f" it is {self.generator[:60]!r}"
            )
        return model

    @property
    def folder(self) -> Path | None:
        """The output folder, None if none is set; raises ConfigurationError for an invalid one."""
        if not self.output_dir:
            return None
        if "://" in self.output_dir:
            raise ConfigurationError(
                "--output-dir (OUTPUT_DIR) must be a folder on this machine; for a bucket use --database,"
                " --output and --layout folders"
            )
        return expand_home(self.output_dir, "--output-dir (OUTPUT_DIR)").absolute()

    @property
    def database_url(self) -> str:
        """The database's URL; raises ConfigurationError unless exactly one was given."""
        folder_url = f"sqlite:///{quote(str(self.folder / DATABASE_NAME))}" if self.folder else None
        return _one_of(
            {
                "--mongo-uri (MONGO_URI)": self.mongo_uri,
                "--database (DATABASE_URL)": self.database,
                "--output-dir (OUTPUT_DIR)": folder_url,
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
        """The host and port that serve metrics, None if none is set, or if it is Kubernetes' variable.

        Raises ConfigurationError for an invalid address.
        """
        if self.metrics_port is None or self.is_metrics_port_of_kubernetes:
            return None
        host, _, port = self.metrics_port.rpartition(":")
        if not re.fullmatch(r"[0-9]{1,5}", port, re.ASCII) or int(port) > 65_535:
            raise ConfigurationError(
                f"--metrics-port (METRICS_PORT) must be PORT or HOST:PORT; it is {self.metrics_port[:60]!r}"
            )
        return host.strip("[]") or "127.0.0.1", int(port)

    @property
    def is_metrics_port_of_kubernetes(self) -> bool:
        """True if METRICS_PORT is what Kubernetes sets in every pod beside a Service called ``metrics``."""
        return re.match(r"(tcp|udp|sctp)://", self.metrics_port or "", re.ASCII) is not None

    @property
    def broker_url(self) -> str | None:
        """The URL of RabbitMQ, None if none is set; raises ConfigurationError if two are."""
        if not (self.rabbitmq_url or self.rabbitmq_host):
            return None
        if "://" in (self.rabbitmq_host or ""):
            raise ConfigurationError(
                "--rabbitmq-host (RABBITMQ_HOST) takes a host, or HOST:PORT; give a URL by --rabbitmq-url"
                " (RABBITMQ_URL)"
            )
        return _one_of(
            {
                "--rabbitmq-url (RABBITMQ_URL)": self.rabbitmq_url,
                "--rabbitmq-host (RABBITMQ_HOST)": self.rabbitmq_host and f"amqp://{self.rabbitmq_host}",
            }
        )


def options() -> Iterator[Option]:
    """Return all options, in the order of their declaration."""
    return declared_in(Settings)


def _one_of(values: Mapping[str, str | None]) -> str:
    """Return the one value that is set; raise ConfigurationError for none or several."""
    given = {name: value for name, value in values.items() if value}
    if len(given) > 1:
        raise ConfigurationError(f"{_listed(given, 'and')} are given; give only one of them")
    if not given:
        raise ConfigurationError(f"none of {_listed(values, 'or')} is given; give one of them")
    return next(iter(given.values()))


def _listed(names: Iterable[str], conjunction: str) -> str:
    *first, last = names
    return f"{', '.join(first)} {conjunction} {last}"


def expand_home(path: str, option: str) -> Path:
    """Return the path with a leading ``~`` replaced by the home directory.

    Raises ConfigurationError, which names the option, if there is none: a container's user may have neither
    HOME nor an entry in the user database.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigurationError(
            f"{option}: {path[:200]} begins in a home directory, and there is none; give an absolute path,"
            " or set HOME"
        ) from None


_HUB_VARIABLES: Final = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")


def check_hub_cache() -> None:
    """Raise ConfigurationError if the hub's client has no folder for its cache.

    Without a home directory it would create a folder named ``~`` in the working directory.
    """
    if not any(os.environ.get(name) for name in _HUB_VARIABLES):
        expand_home("~/.cache/huggingface", "HF_HOME")


def check_url_variables(*names: str) -> None:
    """Raise ConfigurationError for the first of these variables that is set, and is no URL of a service."""
    for name in names:
        value = os.environ.get(name, "")
        if value and not value.lower().startswith(("http://", "https://")):
            raise ConfigurationError(
                f"{name} must begin with http:// or https://; it lacks that: write {name}=http://HOST:PORT"
            )


def check_certificate_variables(*names: str) -> None:
    """Raise ConfigurationError for the first of these variables that names no existing file or folder."""
    for name in names:
        value = os.environ.get(name, "")
        if value and not Path(value).exists():
            raise ConfigurationError(
                f"{name} names {value[:200]}, which does not exist; mount the certificates there, or unset it"
            )


_NOT_TLS: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")
_TLS_ONLY: Final = ("HTTPS server", "HTTPS port", r"\x15\x03")  # what servers answer to plain HTTP
_UNTRUSTED: Final = re.compile(r"certificate verify failed(?:: ([\w '.:-]+))?", re.IGNORECASE)


def tls_fault(exc: BaseException | None, certificates: str) -> str | None:
    """Return what is wrong with a service's URL or certificate, if an error shows that this is its cause.

    ``certificates`` names the setting for certificates that are trusted.
    """
    errors: list[BaseException] = []
    while exc is not None and exc not in errors:
        errors.append(exc)
        exc = exc.__cause__ or exc.__context__
    text = " ".join(f"{error!r} {error}" for error in errors)
    if found := _UNTRUSTED.search(text):
        reason = f" ({found[1].strip()})" if found[1] else ""
        return (
            f"the server's certificate is not trusted{reason}; name a file with its issuer's certificate in"
            f" {certificates}"
        )
    if any(word in text for word in _NOT_TLS):
        return "the server does not use TLS; write http:// for https://"
    if any(word in text for word in _TLS_ONLY):
        return "the server accepts TLS only; write https:// for http://"
    return None
