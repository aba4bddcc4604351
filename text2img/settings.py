"""Every option, declared once: its flag, its variable, its default, what it means.

The dataclass is what the program reads; the command line is made from it, and pydantic-settings fills it
from flags, environment, ``.env.local`` and ``.env``. pydantic is imported only then, so that ``--help`` is
quick. This module does not know what the options do.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Le

from text2img.errors import ConfigurationError, PromptFailed
from text2img.prompts.parameters import Wishes, settle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DEFAULTS = Wishes(num_inference_steps=50, guidance_scale=7.5)
"""What a picture gets where nobody wishes otherwise; its size is the model's own."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option as people meet it. ``default`` is shown where the field's own default does not say it."""

    name: str
    flag: str
    variable: str
    group: str
    meaning: str
    default: object
    secret: bool
    shown: str | None

    @property
    def default_shown(self) -> str:
        """The default as help and README show it."""
        if self.shown is not None:
            return self.shown
        return "–" if self.default is None else str(self.default)


def _option(default: Any, group: str, meaning: str, **more: Any) -> Any:
    return field(default=default, metadata={"group": group, "meaning": meaning, **more})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All options with their values. Secrets stay out of ``repr``; ``secrets`` lists them for masking."""

    mongo_uri: str | None = _option(
        None, "database", "MongoDB connection string; its path names the database, else text2img", secret=True
    )
    database: str | None = _option(
        None,
        "database",
        "the same by URL: mongodb://…, mongodb+srv://… or sqlite:///FILE; one of the two is required",
        variable="DATABASE_URL",
        secret=True,
    )
    datasets_collection: str = _option("datasets", "database", "where the prompts are")
    model_configs_collection: str = _option("model_configs", "database", "where the model configurations are")
    dataset_records_collection: str = _option("dataset_records", "database", "where the results go")
    runs_collection: str = _option("runs", "database", "where the runs are kept")
    callbacks_collection: str = _option("callbacks", "database", "where what is to be told is kept")

    gcs_bucket: str | None = _option(None, "output", "short for --output gs://BUCKET/generated")
    output: str | None = _option(
        None,
        "output",
        "where images go: gs://bucket/prefix or a folder; one of the two is required",
        variable="OUTPUT_URL",
    )
    upload_workers: Annotated[int, Ge(1)] = _option(
        16, "output", "pictures encoded and uploaded at once, at the most"
    )

    callback_url: str | None = _option(None, "callback", "told of results by POST", secret=True)
    callback_secret: str | None = _option(None, "callback", "whsec_…; signs callbacks", secret=True)
    callback_token: str | None = _option(
        None, "callback", "sent as Authorization: Bearer", variable="INTERNAL_API_TOKEN", secret=True
    )
    callback_patience: Annotated[float, Ge(0), Le(86_400)] = _option(
        30, "callback", "seconds a finished run goes on trying to tell before it leaves that to the next one"
    )

    dataset_id: str | None = _option(
        None,
        "selection",
        "only prompts whose dataset_id equals it (as text, or as the ObjectId or number it reads as)",
    )
    limit: Annotated[int, Ge(1)] | None = _option(None, "selection", "prompts this run takes at the most")

    model_config_id: str | None = _option(
        None,
        "model",
        "the model configuration to use, by _id; else the first with model_type stable_diffusion",
    )
    model_id: str | None = _option(
        None, "model", "hub id or folder of the model; beats the model configuration's", shown=DEFAULT_MODEL
    )
    model_revision: str | None = _option(None, "model", "pins a hub revision")
    device: Literal["auto", "cuda", "mps", "cpu"] = _option("auto", "model", "auto, cuda, mps or cpu")
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = _option(
        "auto", "model", "auto (fp16 on a GPU, fp32 on the CPU), fp16, bf16 or fp32"
    )

    num_inference_steps: int | None = _option(
        None, "generation", "denoising steps", shown=str(DEFAULTS.num_inference_steps)
    )
    guidance_scale: float | None = _option(
        None, "generation", "how closely to follow the text", shown=str(DEFAULTS.guidance_scale)
    )
    width: int | None = _option(None, "generation", "pixels", shown="the model's own")
    height: int | None = _option(None, "generation", "pixels", shown="the model's own")
    scheduler: str | None = _option(
        None,
        "generation",
        "dpm++, euler, euler-a, ddim, unipc, pndm, heun or lcm",
        shown="the model's own",
    )
    negative_prompt: str | None = _option(None, "generation", "what the pictures shall not show")
    seed: int | None = _option(
        None,
        "generation",
        "for prompts without a seed of their own; else one derived from the prompt's _id, the same for ever",
    )

    batch_size: Annotated[int, Ge(1)] = _option(10, "run", "prompts a batch at the most")
    run_id: str | None = _option(None, "run", "names the run in documents, logs and callbacks", shown="made")
    max_attempts: Annotated[int, Ge(1)] = _option(3, "run", "tries a prompt gets when it fails itself")
    lease_seconds: Annotated[float, Gt(0), Le(86_400)] = _option(
        60, "run", "how long a silent worker keeps its prompts"
    )

    database_patience: Annotated[float, Ge(0), Le(86_400)] = _option(
        60, "run", "seconds that a run goes on asking a database that has gone away"
    )
    stall_timeout: Annotated[float, Gt(0), Le(86_400)] = _option(
        300, "run", "seconds without a step after which the device counts as hung and the run ends"
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = _option(
        "INFO", "logging", "DEBUG, INFO, WARNING or ERROR"
    )
    log_file: str | None = _option(None, "logging", "a file that gets every log line as JSON as well")
    log_format: Literal["auto", "text", "json"] = _option(
        "auto", "logging", "auto: for people on a terminal, JSON lines with severity elsewhere; text; json"
    )

    def __repr__(self) -> str:
        shown = {option.name: getattr(self, option.name) for option in options() if not option.secret}
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def secrets(self) -> tuple[str, ...]:
        """The values that must never be shown."""
        values = (getattr(self, option.name) for option in options() if option.secret)
        return tuple(value for value in values if value)

    @property
    def wishes(self) -> Wishes:
        """What the flags and variables ask of every picture."""
        return Wishes(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(Wishes) if hasattr(self, f.name)}
        )

    @property
    def database_url(self) -> str:
        """The database's URL; raises ConfigurationError unless exactly one was given."""
        return _one_of(self.mongo_uri, self.database, "--mongo-uri (MONGO_URI)", "--database (DATABASE_URL)")

    @property
    def output_url(self) -> str:
        """The storage's URL; raises ConfigurationError unless exactly one was given."""
        bucket = f"gs://{self.gcs_bucket}/generated" if self.gcs_bucket else None
        return _one_of(bucket, self.output, "--gcs-bucket (GCS_BUCKET)", "--output (OUTPUT_URL)")


def options() -> Iterator[Option]:
    """All options, in the order of their declaration."""
    for declared in dataclasses.fields(Settings):
        more = declared.metadata
        yield Option(
            name=declared.name,
            flag="--" + declared.name.replace("_", "-"),
            variable=more.get("variable", declared.name.upper()),
            group=more["group"],
            meaning=more["meaning"],
            default=declared.default,
            secret=more.get("secret", False),
            shown=more.get("shown"),
        )


def load(flags: Mapping[str, str], *, environment: bool = True) -> Settings:
    """The settings from ``flags`` (option name → text), then the environment, ``.env.local``, ``.env``.

    Without ``environment`` from the flags alone. Raises ConfigurationError with a line that names the option.
    """
    from pydantic import ValidationError

    from text2img.environment import read

    try:
        values = read(
            tuple(options()), get_type_hints(Settings, include_extras=True), flags, environment=environment
        )
    except ValidationError as exc:
        raise ConfigurationError(_sentence(exc.errors()[0])) from None
    settings = Settings(**_prefer_flags(values, flags))
    _check(settings)
    return settings


def _prefer_flags(values: dict[str, Any], flags: Mapping[str, str]) -> dict[str, Any]:
    """A flag also beats the variable of the option that says the same in another way."""
    for one, other in (("mongo_uri", "database"), ("gcs_bucket", "output")):
        if (one in flags) != (other in flags):
            values[other if one in flags else one] = None
    return values


def _check(settings: Settings) -> None:
    try:
        settle((settings.wishes, DEFAULTS, Wishes(width=512, height=512)), seed=0)
    except PromptFailed as exc:
        name, _, rest = str(exc).partition(" ")
        raise ConfigurationError(f"--{name.replace('_', '-')} {rest}") from None
    run_id = settings.run_id or "made"
    if len(run_id) > 100 or not all(char.isalnum() or char in "._-" for char in run_id):
        raise ConfigurationError("--run-id must be at most 100 letters, digits, dots, dashes and underscores")


def _sentence(error: Any) -> str:
    """One line for pydantic's first complaint; a secret's value is never part of it."""
    where = str(error["loc"][0])
    option = next((option for option in options() if option.variable.lower() == where), None)
    name = f"{option.flag} ({option.variable})" if option else where
    message = error["msg"].removeprefix("Value error, ")
    message = f"{message[:1].lower()}{message[1:]}"
    shown = "" if option is None or option.secret else f"; it is {str(error['input'])[:60]!r}"
    return f"{name}: {message}{shown}"


def _one_of(one: str | None, other: str | None, one_name: str, other_name: str) -> str:
    if one and other:
        raise ConfigurationError(f"both {one_name} and {other_name} are given; give one of the two")
    if not one and not other:
        raise ConfigurationError(f"neither {one_name} nor {other_name} is given; give one of the two")
    return one or other or ""
