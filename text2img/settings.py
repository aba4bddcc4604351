"""Every option, declared once: its flag, its variable, its default, what it means.

The dataclass is what the program reads; the command line is made from it, and ``environment`` fills it. This
module does not know what the options do, and imports little, so that ``--help`` is quick.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from text2img.errors import ConfigurationError
from text2img.prompts.loop import MOST_CANDIDATES, MOST_ITERATIONS, Loop
from text2img.prompts.names import ObjectName, TryName
from text2img.prompts.parameters import Wishes
from text2img.prompts.sizes import BatchSize

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DATABASE_NAME = "text2img.db"
"""The file in an output folder that holds its database."""
DEFAULTS = Wishes(num_inference_steps=50, guidance_scale=7.5)
"""What a picture gets where nobody wishes otherwise; its size is the model's own."""
_HOSTED = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*){1,7}", re.ASCII)
"""A model's name with its owner, and what of it is asked: fal-ai/flux/dev. It becomes a part of URLs."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option as people meet it. ``default`` is shown where the field's own default does not say it.

    ``also``: further variables that say the same, where ``variable`` says nothing.
    """

    name: str
    flag: str
    variable: str
    group: str
    meaning: str
    default: object
    secret: bool
    shown: str | None
    also: tuple[str, ...] = ()

    @property
    def switch(self) -> bool:
        """Whether the flag alone says yes."""
        return isinstance(self.default, bool)

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
        "the same by URL: mongodb://…, mongodb+srv://… or sqlite:///FILE; one of the two is required, "
        "or --output-dir",
        variable="DATABASE_URL",
        secret=True,
    )
    output_dir: str | None = _option(
        None,
        "database",
        "a folder for all of it: the database DIR/text2img.db, and in DIR/results/ a folder for each prompt",
    )
    datasets_collection: str = _option("datasets", "database", "where the prompts are")
    model_configs_collection: str = _option("model_configs", "database", "where the model configurations are")
    dataset_records_collection: str = _option("dataset_records", "database", "where the results go")
    runs_collection: str = _option("runs", "database", "where the runs are kept")
    callbacks_collection: str = _option("callbacks", "database", "where what is to be told is kept")

    gcs_bucket: str | None = _option(None, "output", "short for --output gs://BUCKET/generated")
    s3_bucket: str | None = _option(None, "output", "short for --output s3://BUCKET/generated")
    output: str | None = _option(
        None,
        "output",
        "where images go: gs://bucket/prefix, s3://bucket/prefix or a folder; one of these is required",
        variable="OUTPUT_URL",
    )
    layout: Literal["flat", "folders"] | None = _option(
        None,
        "output",
        "flat: a file for each picture; folders: one for each prompt, with its iterations and what is known",
        shown="flat; folders with --output-dir",
    )
    s3_endpoint: str | None = _option(
        None, "output", "the URL of an S3-compatible service; else what AWS_ENDPOINT_URL says, else Amazon's"
    )
    acl: (
        Literal[
            "private", "public-read", "authenticated-read", "bucket-owner-read", "bucket-owner-full-control"
        ]
        | None
    ) = _option(
        None,
        "output",
        "who may read the pictures in a bucket: private, public-read, authenticated-read, bucket-owner-read "
        "or bucket-owner-full-control",
        shown="the bucket's rules",
    )
    public_urls: bool = _option(
        default=False,
        group="output",
        meaning="image_url is the https:// URL of the picture in its bucket",
        shown="no",
    )
    upload_workers: Annotated[int, Ge(1)] = _option(
        16, "output", "pictures encoded and uploaded at once, at the most (encoded: four)"
    )

    callback_url: str | None = _option(None, "callback", "told of results by POST", secret=True)
    callback_secret: str | None = _option(None, "callback", "whsec_…; signs callbacks", secret=True)
    callback_token: str | None = _option(
        None, "callback", "sent as Authorization: Bearer", variable="INTERNAL_API_TOKEN", secret=True
    )
    webhook_host: str | None = _option(
        None,
        "callback",
        "hosts that prompts' own webhooks may be on, with commas between: backend.example, "
        "backend.example:8000, *.example.com",
        shown="none",
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

    input_file: str | None = _option(
        None,
        "input",
        "prompts of a .json, .jsonl, .yaml, .csv or .txt file, added first; one that is there with other "
        "content is made again",
    )

    model_config_id: str | None = _option(
        None,
        "model",
        "the model configuration to use, by _id; else the first with model_type stable_diffusion",
    )
    model_id: str | None = _option(
        None,
        "model",
        "hub id, folder, gs://… or s3://… of the model; beats the model configuration's",
        shown=DEFAULT_MODEL,
    )
    model_revision: str | None = _option(None, "model", "pins a hub revision")
    model_cache: str | None = _option(
        None,
        "model",
        "folder that keeps models from buckets for later runs",
        shown="~/.cache/text2img/models",
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = _option("auto", "model", "auto, cuda, mps or cpu")
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = _option(
        "auto", "model", "auto (fp16 on a GPU, fp32 on the CPU), fp16, bf16 or fp32"
    )
    compile: Literal["auto", "always", "never"] = _option(
        "auto",
        "model",
        "compile the denoiser: auto (on a GPU, where the run is long enough), always or never",
    )
    compile_cache: str | None = _option(
        None, "model", "folder that keeps what was compiled and measured for later runs; may be a volume"
    )
    offload: Literal["none", "model", "sequential"] = _option(
        "none",
        "model",
        "for small cards, weights wait in the host's memory: none, model (a part at a time is on the device) "
        "or sequential (a layer at a time: slow)",
    )
    feature_cache: Annotated[int, Ge(0), Le(1000)] | None = _option(
        None,
        "model",
        "an approximation: compute the deep part of a UNet at every N-th step only (from 2 on)",
        shown="0",
    )
    autoencoder: str | None = _option(
        None,
        "model",
        "an approximation: folder or hub id of a tiny autoencoder that decodes instead of the model's own",
    )
    lora_source: str | None = _option(
        None,
        "model",
        "where LoRAs may come from, with commas between: a folder, hub:, hub:OWNER/, gs://BUCKET/PREFIX/, "
        "s3://BUCKET/PREFIX/, https://HOST/PATH/",
        shown="nowhere",
    )
    lora_cache: str | None = _option(
        None, "model", "folder that keeps fetched LoRAs for later runs", shown="~/.cache/text2img/loras"
    )
    lora_cache_size: Annotated[float, Gt(0), Le(100_000)] = _option(
        10, "model", "GB that it may hold; the least recently used go first"
    )

    generator: str = _option(
        "local", "generator", "local, or fal:MODEL: a model that fal hosts, such as fal:fal-ai/flux/dev"
    )
    generator_url: str | None = _option(
        None, "generator", "the URL of another service that speaks like the generator's", shown="fal's own"
    )
    generator_patience: Annotated[float, Gt(0), Le(86_400)] = _option(
        60, "generator", "seconds that a run goes on asking a hosted generator that does not answer"
    )
    fal_ai_api_key: str | None = _option(
        None, "generator", "the key for fal; FAL_KEY says the same", secret=True, also=("FAL_KEY",)
    )

    num_inference_steps: int | None = _option(
        None, "generation", "denoising steps", shown=str(DEFAULTS.num_inference_steps)
    )
    guidance_scale: float | None = _option(
        None, "generation", "how closely to follow the text", shown=str(DEFAULTS.guidance_scale)
    )
    width: int | None = _option(None, "generation", "pixels", shown="the model's own")
    height: int | None = _option(None, "generation", "pixels", shown="the model's own")
    aspect_ratio: str | None = _option(
        None, "generation", "1:1, 2:2, 1:2, 2:1, 3:2, 2:3, 4:3, 3:4, 16:9 or 9:16, of the model's own size"
    )
    num_images: int | None = _option(
        None, "generation", "pictures of each prompt (1 … 100), with seed, seed + 1, …", shown="1"
    )
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

    artist_name: str | None = _option(
        None, "picture", "signs the pictures of prompts without an artist_name of their own"
    )
    signature_position: str | None = _option(
        None, "picture", "bottom-right or bottom-left", shown="bottom-right"
    )
    signature_opacity: int | None = _option(
        None, "picture", "0 (not to be seen) … 255 (hides what is below)", shown="128"
    )
    signature_font: str | None = _option(
        None,
        "picture",
        "a TrueType or OpenType font's file, for names in other scripts",
        shown="DejaVu Sans Bold",
    )
    object_name: str = _option(
        "{id}", "picture", "a picture's name without its ending, around {id} or {generation_id} (the same)"
    )
    image_format: str | None = _option(None, "picture", "png, jpeg or webp", shown="png")
    image_quality: int | None = _option(
        None,
        "picture",
        "1 … 100, of a JPEG; a WebP is lossless unless it is given; a PNG always is",
        shown="95",
    )

    evaluator: str = _option(
        "none",
        "evaluation",
        "scores each picture: none, clip or clip:MODEL (folder or hub id), gemini or gemini:MODEL, demo",
    )
    iterations: Annotated[int, Ge(1), Le(MOST_ITERATIONS)] = _option(
        1,
        "evaluation",
        "rounds that a prompt gets, refined from the second on, until a picture scores enough",
    )
    candidates: Annotated[int, Ge(1), Le(MOST_CANDIDATES)] = _option(
        1, "evaluation", "pictures in each round, with a seed each; the best of all is the result"
    )
    min_score: Annotated[float, Ge(0), Le(1)] | None = _option(
        None, "evaluation", "the score, from 0 to 1, that is enough", shown="1"
    )
    gemini_api_key: str | None = _option(None, "evaluation", "the key of --evaluator gemini", secret=True)

    batch_size: str = _option(
        "10", "run", "prompts a batch at the most; auto or auto:N: the fastest size, found up to N (64)"
    )
    run_id: str | None = _option(
        None,
        "run",
        "names the run in documents, logs and callbacks; a task of a job adds its index",
        shown="made",
    )
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
    metrics_textfile: str | None = _option(
        None, "metrics", "a .prom file for node_exporter, written anew every --metrics-seconds and at the end"
    )
    pushgateway: str | None = _option(
        None, "metrics", "URL of a Prometheus Pushgateway that gets the run's metrics as often", secret=True
    )
    metrics_seconds: Annotated[float, Ge(1), Le(86_400)] = _option(
        15, "metrics", "seconds between looks at the database for the metrics, and between writing them"
    )
    gpu_hour_price: Annotated[float, Ge(0), Le(1_000_000)] | None = _option(
        None, "run", "dollars that an hour of the machine costs; the run then says what 1,000 images cost"
    )

    workers: Annotated[int, Ge(1), Le(10_000)] | Literal["auto"] | None = _option(
        None,
        "distributed",
        "workers in processes of their own, by Ray: how many, or auto: one for each GPU, else one",
        shown="one, in this process",
    )
    ray_address: str | None = _option(
        None,
        "distributed",
        "the Ray cluster that --workers work on, auto or HOST:PORT; else one is started on this machine",
    )

    rabbitmq_url: str | None = _option(
        None,
        "serving",
        "amqp://… or amqps://… of a RabbitMQ whose messages become prompts; else the database is looked at",
        secret=True,
    )
    rabbitmq_host: str | None = _option(None, "serving", "short for --rabbitmq-url amqp://HOST")
    rabbitmq_queue: str = _option(
        "image_generation", "serving", "the queue that is consumed; made, durable, where it is not there"
    )
    rabbitmq_dead_letter_queue: str | None = _option(
        None,
        "serving",
        "where messages go that are not valid, with the reason in a header",
        shown="the queue's name and .dead",
    )
    rabbitmq_prefetch: Annotated[int, Ge(1), Le(10_000)] = _option(
        100, "serving", "messages that may be on their way into the database at once"
    )
    metrics_port: str | None = _option(
        None,
        "serving",
        "PORT, or HOST:PORT: answers Prometheus at /metrics there; on 127.0.0.1 where no host is named",
    )
    idle_exit: Annotated[float, Gt(0), Le(10_000_000)] | None = _option(
        None, "serving", "seconds without work after which the server ends, with status 0"
    )
    poll_seconds: Annotated[float, Gt(0), Le(3600)] = _option(
        5, "serving", "seconds between looks at the database while it is idle, at the most; one at first"
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
    def object_names(self) -> ObjectName | TryName:
        """What pictures are called; raises ConfigurationError for a template that cannot be."""
        if self.folders:
            if self.object_name != ObjectName.TEMPLATE:
                raise ConfigurationError(
                    "--object-name (OBJECT_NAME) does nothing for a layout of folders; give --layout flat, or"
                    " leave it out"
                )
            return TryName()
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

        Raises ConfigurationError where nothing could say how good a picture is.
        """
        if (self.iterations, self.candidates, self.min_score) == (1, 1, None):
            return None
        if self.evaluator == "none":
            raise ConfigurationError(
                "--iterations, --candidates and --min-score need scores; say by --evaluator (EVALUATOR) who"
                " gives them"
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
    def database_url(self) -> str:
        """The database's URL; raises ConfigurationError unless exactly one was given."""
        return _one_of(
            {
                "--mongo-uri (MONGO_URI)": self.mongo_uri,
                "--database (DATABASE_URL)": self.database,
                "--output-dir (OUTPUT_DIR)": self.output_dir
                and f"sqlite:///{Path(self.output_dir).expanduser().absolute() / DATABASE_NAME}",
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
            also=more.get("also", ()),
        )


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
