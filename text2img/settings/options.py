"""Every option of the command line, once: its flag, variable, default and meaning."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from text2img.prompts.parameters import RequestedParameters
from text2img.prompts.refinement import MAX_CANDIDATES, MAX_ITERATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator


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


def option(default: Any, group: str, meaning: str, **more: Any) -> Any:
    """A field of a class of options: its default, the group it is listed in, what it means."""
    return field(default=default, metadata={"group": group, "meaning": meaning, **more})


def declared_in(settings: Any) -> Iterator[Option]:
    """The options of a class, in the order of their declaration."""
    for declared in dataclasses.fields(settings):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSettings:
    """Database, output, callbacks, and which prompts."""

    mongo_uri: str | None = option(
        None, "database", "MongoDB connection string; its path names the database, else text2img", secret=True
    )
    database: str | None = option(
        None,
        "database",
        "the same by URL: mongodb://…, mongodb+srv://… or sqlite:///FILE; one of the two is required, "
        "or --output-dir",
        variable="DATABASE_URL",
        secret=True,
    )
    output_dir: str | None = option(
        None,
        "database",
        "a folder for all of it: the database DIR/text2img.db, and in DIR/results/ a folder for each prompt",
    )
    datasets_collection: str = option("datasets", "database", "where the prompts are")
    model_configs_collection: str = option("model_configs", "database", "where the model configurations are")
    dataset_records_collection: str = option("dataset_records", "database", "where the results go")
    runs_collection: str = option("runs", "database", "where the runs are kept")
    callbacks_collection: str = option("callbacks", "database", "where what is to be told is kept")

    gcs_bucket: str | None = option(None, "output", "short for --output gs://BUCKET/generated")
    s3_bucket: str | None = option(None, "output", "short for --output s3://BUCKET/generated")
    output: str | None = option(
        None,
        "output",
        "where images go: gs://bucket/prefix, s3://bucket/prefix or a folder; one of these is required",
        variable="OUTPUT_URL",
    )
    layout: Literal["flat", "folders"] | None = option(
        None,
        "output",
        "flat: a file for each picture; folders: one for each prompt, with its iterations and what is known",
        shown="flat; folders with --output-dir",
    )
    s3_endpoint: str | None = option(
        None, "output", "the URL of an S3-compatible service; else what AWS_ENDPOINT_URL says, else Amazon's"
    )
    acl: (
        Literal[
            "private", "public-read", "authenticated-read", "bucket-owner-read", "bucket-owner-full-control"
        ]
        | None
    ) = option(
        None,
        "output",
        "who may read the pictures in a bucket: private, public-read, authenticated-read, bucket-owner-read "
        "or bucket-owner-full-control",
        shown="the bucket's rules",
    )
    public_urls: bool = option(
        default=False,
        group="output",
        meaning="image_url is the https:// URL of the picture in its bucket",
        shown="no",
    )
    upload_workers: Annotated[int, Ge(1)] = option(
        16, "output", "pictures encoded and uploaded at once, at the most (encoded: four)"
    )

    callback_url: str | None = option(None, "callback", "told of results by POST", secret=True)
    callback_secret: str | None = option(None, "callback", "whsec_…; signs callbacks", secret=True)
    callback_token: str | None = option(
        None, "callback", "sent as Authorization: Bearer", variable="INTERNAL_API_TOKEN", secret=True
    )
    webhook_host: str | None = option(
        None,
        "callback",
        "hosts that prompts' own webhooks may be on, with commas between: backend.example, "
        "backend.example:8000, *.example.com",
        shown="none",
    )
    callback_patience: Annotated[float, Ge(0), Le(86_400)] = option(
        30, "callback", "seconds a finished run goes on trying to tell before it leaves that to the next one"
    )

    dataset_id: str | None = option(
        None,
        "selection",
        "only prompts whose dataset_id equals it (as text, or as the ObjectId or number it reads as)",
    )
    limit: Annotated[int, Ge(1)] | None = option(None, "selection", "prompts this run takes at the most")

    input_file: str | None = option(
        None,
        "input",
        "prompts of a .json, .jsonl, .yaml, .csv or .txt file, added first; one that is there with other "
        "content is made again",
    )


DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DEFAULTS = RequestedParameters(num_inference_steps=50, guidance_scale=7.5)
"""What a picture gets where nobody wishes otherwise; its size is the model's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings(EndpointSettings):
    """Model, generator, parameters, what is done to the pixels, and the evaluator."""

    model_config_id: str | None = option(
        None,
        "model",
        "the model configuration to use, by _id; else the first with model_type stable_diffusion",
    )
    model_id: str | None = option(
        None,
        "model",
        "hub id, folder, gs://… or s3://… of the model; beats the model configuration's",
        shown=DEFAULT_MODEL,
    )
    model_revision: str | None = option(None, "model", "pins a hub revision")
    model_cache: str | None = option(
        None,
        "model",
        "folder that keeps models from buckets for later runs",
        shown="~/.cache/text2img/models",
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "model", "auto, cuda, mps or cpu")
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = option(
        "auto", "model", "auto (fp16 on a GPU, fp32 on the CPU), fp16, bf16 or fp32"
    )
    compile: Literal["auto", "always", "never"] = option(
        "auto",
        "model",
        "compile the denoiser: auto (on a GPU, where the run is long enough), always or never",
    )
    compile_cache: str | None = option(
        None, "model", "folder that keeps what was compiled and measured for later runs; may be a volume"
    )
    offload: Literal["none", "model", "sequential"] = option(
        "none",
        "model",
        "for small cards, weights wait in the host's memory: none, model (a part at a time is on the device) "
        "or sequential (a layer at a time: slow)",
    )
    feature_cache: Annotated[int, Ge(0), Le(1000)] | None = option(
        None,
        "model",
        "an approximation: compute the deep part of a UNet at every N-th step only (from 2 on)",
        shown="0",
    )
    autoencoder: str | None = option(
        None,
        "model",
        "an approximation: folder or hub id of a tiny autoencoder that decodes instead of the model's own",
    )
    lora_source: str | None = option(
        None,
        "model",
        "where LoRAs may come from, with commas between: a folder, hub:, hub:OWNER/, gs://BUCKET/PREFIX/, "
        "s3://BUCKET/PREFIX/, https://HOST/PATH/",
        shown="nowhere",
    )
    lora_cache: str | None = option(
        None, "model", "folder that keeps fetched LoRAs for later runs", shown="~/.cache/text2img/loras"
    )
    lora_cache_size: Annotated[float, Gt(0), Le(100_000)] = option(
        10, "model", "GB that it may hold; the least recently used go first"
    )

    generator: str = option(
        "local", "generator", "local, or fal:MODEL: a model that fal hosts, such as fal:fal-ai/flux/dev"
    )
    generator_url: str | None = option(
        None, "generator", "the URL of another service that speaks like the generator's", shown="fal's own"
    )
    generator_patience: Annotated[float, Gt(0), Le(86_400)] = option(
        60, "generator", "seconds that a run goes on asking a hosted generator that does not answer"
    )
    fal_ai_api_key: str | None = option(
        None, "generator", "the key for fal; FAL_KEY says the same", secret=True, also=("FAL_KEY",)
    )

    num_inference_steps: int | None = option(
        None, "generation", "denoising steps", shown=str(DEFAULTS.num_inference_steps)
    )
    guidance_scale: float | None = option(
        None, "generation", "how closely to follow the text", shown=str(DEFAULTS.guidance_scale)
    )
    width: int | None = option(None, "generation", "pixels", shown="the model's own")
    height: int | None = option(None, "generation", "pixels", shown="the model's own")
    aspect_ratio: str | None = option(
        None, "generation", "1:1, 2:2, 1:2, 2:1, 3:2, 2:3, 4:3, 3:4, 16:9 or 9:16, of the model's own size"
    )
    num_images: int | None = option(
        None, "generation", "pictures of each prompt (1 … 100), with seed, seed + 1, …", shown="1"
    )
    scheduler: str | None = option(
        None,
        "generation",
        "dpm++, euler, euler-a, ddim, unipc, pndm, heun or lcm",
        shown="the model's own",
    )
    negative_prompt: str | None = option(None, "generation", "what the pictures shall not show")
    seed: int | None = option(
        None,
        "generation",
        "for prompts without a seed of their own; else one derived from the prompt's _id, the same for ever",
    )

    artist_name: str | None = option(
        None, "picture", "signs the pictures of prompts without an artist_name of their own"
    )
    signature_position: str | None = option(
        None, "picture", "bottom-right or bottom-left", shown="bottom-right"
    )
    signature_opacity: int | None = option(
        None, "picture", "0 (not to be seen) … 255 (hides what is below)", shown="128"
    )
    signature_font: str | None = option(
        None,
        "picture",
        "a TrueType or OpenType font's file, for names in other scripts",
        shown="DejaVu Sans Bold",
    )
    object_name: str = option(
        "{id}", "picture", "a picture's name without its ending, around {id} or {generation_id} (the same)"
    )
    image_format: str | None = option(None, "picture", "png, jpeg or webp", shown="png")
    image_quality: int | None = option(
        None,
        "picture",
        "1 … 100, of a JPEG; a WebP is lossless unless it is given; a PNG always is",
        shown="95",
    )

    evaluator: str = option(
        "none",
        "evaluation",
        "scores each picture: none, clip or clip:MODEL (folder or hub id), gemini or gemini:MODEL, demo",
    )
    iterations: Annotated[int, Ge(1), Le(MAX_ITERATIONS)] = option(
        1,
        "evaluation",
        "rounds that a prompt gets, refined from the second on, until a picture scores enough",
    )
    candidates: Annotated[int, Ge(1), Le(MAX_CANDIDATES)] = option(
        1, "evaluation", "pictures in each round, with a seed each; the best of all is the result"
    )
    min_score: Annotated[float, Ge(0), Le(1)] | None = option(
        None, "evaluation", "the score, from 0 to 1, that is enough", shown="1"
    )
    gemini_api_key: str | None = option(None, "evaluation", "the key of --evaluator gemini", secret=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSettings(GenerationSettings):
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
