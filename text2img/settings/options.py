"""Every option of the command line, once: its flag, variable, default and meaning."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from text2img.prompts.parameters import MAX_IMAGES, RequestedParameters
from text2img.prompts.refinement import MAX_CANDIDATES, MAX_ITERATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Option:
    """An option of the command line and the environment.

    ``shown`` is the default in the help and in docs/options.md, if the field's own default does not explain
    itself. ``in_file``: ``<VARIABLE>_FILE`` may name a file with the value, as for every secret. ``also`` are
    further variables for the same option, used if ``variable`` is not set.
    """

    name: str
    flag: str
    variable: str
    group: str
    meaning: str
    default: object
    secret: bool
    in_file: bool
    shown: str | None
    also: tuple[str, ...] = ()

    @property
    def switch(self) -> bool:
        """True if the flag needs no value."""
        return isinstance(self.default, bool)

    @property
    def default_shown(self) -> str:
        """The default as the help and docs/options.md show it."""
        if self.shown is not None:
            return self.shown
        return "–" if self.default is None else str(self.default)


def option(default: Any, group: str, meaning: str, **more: Any) -> Any:
    """Declare a field of a class of options: its default, the group that lists it, its meaning."""
    return field(default=default, metadata={"group": group, "meaning": meaning, **more})


def declared_in(settings: Any) -> Iterator[Option]:
    """Yield the options of a class, in the order of their declaration."""
    for declared in dataclasses.fields(settings):
        metadata = declared.metadata
        yield Option(
            name=declared.name,
            flag="--" + declared.name.replace("_", "-"),
            variable=metadata.get("variable", declared.name.upper()),
            group=metadata["group"],
            meaning=metadata["meaning"],
            default=declared.default,
            secret=metadata.get("secret", False),
            in_file=metadata.get("in_file", metadata.get("secret", False)),
            shown=metadata.get("shown"),
            also=metadata.get("also", ()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSettings:
    """Options for the database, the output, callbacks, and the selection of prompts."""

    mongo_uri: str | None = option(
        None,
        "database",
        "MongoDB connection string; its path names the database (text2img if it has none)",
        secret=True,
    )
    database: str | None = option(
        None,
        "database",
        "database URL: mongodb://…, mongodb+srv://… or sqlite:///FILE; one of --mongo-uri, --database and "
        "--output-dir is required",
        variable="DATABASE_URL",
        secret=True,
    )
    output_dir: str | None = option(
        None,
        "database",
        "folder for database and images: DIR/text2img.db, and a folder for each prompt in DIR/results/",
    )
    datasets_collection: str = option("datasets", "database", "collection of prompts")
    model_configs_collection: str = option("model_configs", "database", "collection of model configurations")
    dataset_records_collection: str = option("dataset_records", "database", "collection of results")
    runs_collection: str = option("runs", "database", "collection of runs")
    callbacks_collection: str = option("callbacks", "database", "collection of undelivered notifications")

    gcs_bucket: str | None = option(None, "output", "short for --output gs://BUCKET/generated")
    s3_bucket: str | None = option(None, "output", "short for --output s3://BUCKET/generated")
    output: str | None = option(
        None,
        "output",
        "destination of images: gs://bucket/prefix, s3://bucket/prefix or a folder; one of --gcs-bucket, "
        "--s3-bucket, --output and --output-dir is required",
        variable="OUTPUT_URL",
    )
    layout: Literal["flat", "folders"] | None = option(
        None,
        "output",
        "flat: one file for each image; folders: one folder for each prompt, with iterations and metadata",
        shown="flat; folders with --output-dir",
    )
    s3_endpoint: str | None = option(
        None, "output", "URL of an S3-compatible service; by default AWS_ENDPOINT_URL, else Amazon's"
    )
    acl: (
        Literal[
            "private", "public-read", "authenticated-read", "bucket-owner-read", "bucket-owner-full-control"
        ]
        | None
    ) = option(
        None,
        "output",
        "access to the images in a bucket: private, public-read, authenticated-read, bucket-owner-read or "
        "bucket-owner-full-control",
        shown="the bucket's rules",
    )
    public_urls: bool = option(
        default=False,
        group="output",
        meaning="record the https:// URL of the image in its bucket as image_url",
        shown="no",
    )
    upload_workers: Annotated[int, Ge(1)] = option(
        16, "output", "upload threads; at most four images are encoded at once"
    )

    callback_url: str | None = option(None, "callback", "URL that receives results by POST", secret=True)
    callback_secret: str | None = option(None, "callback", "key that signs callbacks, whsec_…", secret=True)
    callback_token: str | None = option(
        None,
        "callback",
        "token of callbacks, sent as Authorization: Bearer",
        variable="INTERNAL_API_TOKEN",
        secret=True,
    )
    webhook_host: str | None = option(
        None,
        "callback",
        "allowed hosts of prompts' own webhooks, separated by commas: backend.example, "
        "backend.example:8000, *.example.com",
        shown="none",
    )
    callback_patience: Annotated[float, Ge(0), Le(86_400)] = option(
        30, "callback", "seconds that a finished run retries callbacks before it leaves them to the next run"
    )

    dataset_id: str | None = option(
        None,
        "selection",
        "only prompts whose dataset_id equals it (as text, or as the ObjectId or number it reads as)",
    )
    limit: Annotated[int, Ge(1)] | None = option(None, "run", "maximum number of prompts in this run")

    input_file: str | None = option(
        None,
        "input",
        "a .json, .jsonl, .yaml, .csv or .txt file of prompts, added first; a prompt whose content changed "
        "is generated again, and a pending one that has left the file is removed",
    )
    prompt_syntax: Literal["warn", "refuse"] = option(
        "warn",
        "prompts",
        "warn or refuse: what other programs read as syntax, such as (word:1.3), __name__ or "
        "<lora:…>, is plain text here",
    )


DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DEFAULTS = RequestedParameters(num_inference_steps=50, guidance_scale=7.5)
"""Parameters of an image that nothing else sets, not even the model; its default size is the model's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSettings(EndpointSettings):
    """Options for the model, the generator, its parameters, the image files, and the evaluator."""

    model_config_id: str | None = option(
        None,
        "model",
        "_id of the model configuration; by default the first with model_type stable_diffusion",
    )
    model_id: str | None = option(
        None,
        "model",
        "hub id, folder, gs://… or s3://… of the model, or a .safetensors or .gguf file in one of these; "
        "overrides the model configuration",
        shown=DEFAULT_MODEL,
    )
    model_revision: str | None = option(None, "model", "hub revision of the model")
    model_base: str | None = option(
        None,
        "model",
        "whole model (folder, hub id, gs://… or s3://…) that lends a single file what it does not hold",
    )
    variant: str | None = option(None, "model", "variant of the model's weights, such as fp16")
    model_cache: str | None = option(
        None,
        "model",
        "cache folder for models from buckets",
        shown="~/.cache/text2img/models",
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "model", "auto, cuda, mps or cpu")
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = option(
        "auto",
        "model",
        "auto (fp32 on the CPU; on a GPU bf16 for transformers with bf16 weights, else fp16), fp16, bf16 or "
        "fp32",
    )
    compile: Literal["auto", "always", "never"] = option(
        "auto",
        "model",
        "compile the denoiser: auto (on a GPU, if the run is long enough), always or never",
    )
    compile_cache: str | None = option(
        None, "model", "cache folder for compiled code and measurements; may be a volume"
    )
    offload: Literal["none", "model", "sequential"] = option(
        "none",
        "model",
        "keep weights in host memory, for small GPUs: none, model (one component at a time on the device) or "
        "sequential (one layer at a time; slow)",
    )
    feature_cache: Annotated[int, Ge(0), Le(1000)] | None = option(
        None,
        "model",
        "approximation: compute the deep part of a UNet only at every N-th step (N ≥ 2)",
        shown="0",
    )
    autoencoder: str | None = option(
        None,
        "model",
        "folder or hub id of an autoencoder that decodes instead of the model's own: a full one of the same "
        "latent space, or a tiny one, which is an approximation",
    )
    lora_source: str | None = option(
        None,
        "model",
        "allowed sources of LoRAs, separated by commas: a folder, hub:, hub:OWNER/, gs://BUCKET/PREFIX/, "
        "s3://BUCKET/PREFIX/, https://HOST/PATH/",
        shown="nowhere",
    )
    lora_cache: str | None = option(
        None, "model", "cache folder for fetched LoRAs", shown="~/.cache/text2img/loras"
    )
    lora_cache_size: Annotated[float, Gt(0), Le(100_000)] = option(
        10, "model", "maximum size of the LoRA cache in GB; the least recently used are removed first"
    )

    generator: str = option(
        "local", "generator", "local, or fal:MODEL for a model hosted by fal, such as fal:fal-ai/flux/dev"
    )
    generator_url: str | None = option(
        None, "generator", "URL of another service with the generator's API", shown="fal's own"
    )
    generator_patience: Annotated[float, Gt(0), Le(86_400)] = option(
        60, "generator", "seconds that a run retries an unavailable hosted generator before it fails"
    )
    fal_ai_api_key: str | None = option(
        None, "generator", "API key for fal; also read from FAL_KEY", secret=True, also=("FAL_KEY",)
    )

    num_inference_steps: int | None = option(None, "generation", "denoising steps", shown="the model's own")
    guidance_scale: float | None = option(
        None, "generation", "how closely to follow the text", shown="the model's own"
    )
    width: int | None = option(None, "generation", "width in pixels", shown="the model's own")
    height: int | None = option(None, "generation", "height in pixels", shown="the model's own")
    aspect_ratio: str | None = option(
        None,
        "generation",
        "1:1, 2:2, 1:2, 2:1, 3:2, 2:3, 4:3, 3:4, 16:9 or 9:16, relative to the model's own size",
    )
    num_images: int | None = option(
        None, "generation", "images for each prompt (1 … 100), with seeds seed, seed + 1, …", shown="1"
    )
    scheduler: str | None = option(
        None,
        "generation",
        "dpm++, euler, euler-a, ddim, unipc, pndm, heun or lcm",
        shown="the model's own",
    )
    negative_prompt: str | None = option(None, "generation", "negative prompt")
    seed: int | None = option(
        None,
        "generation",
        "seed of prompts without their own; by default derived from the prompt's _id, the same in every run",
    )

    max_pixels: Annotated[int, Ge(4096), Le(4096**2)] = option(
        4096**2, "generation", "maximum pixels, width × height, of the images of one prompt"
    )
    max_steps: Annotated[int, Ge(1), Le(1000)] = option(
        1000, "generation", "maximum denoising steps that one prompt may request"
    )
    max_images: Annotated[int, Ge(1), Le(MAX_IMAGES)] = option(
        MAX_IMAGES, "generation", "maximum images that one prompt may request"
    )
    max_work: Annotated[float, Gt(0), Le(10_000_000)] = option(
        25_000, "generation", "maximum work of one prompt: images × steps × megapixels"
    )

    artist_name: str | None = option(
        None, "image", "name that signs the images of prompts without their own artist_name"
    )
    signature_position: str | None = option(
        None, "image", "bottom-right or bottom-left", shown="bottom-right"
    )
    signature_opacity: int | None = option(None, "image", "0 (invisible) to 255 (opaque)", shown="128")
    signature_font: str | None = option(
        None,
        "image",
        "TrueType or OpenType font file, for names in other scripts",
        shown="DejaVu Sans Bold",
    )
    object_name: str = option(
        "{id}",
        "image",
        "name of an image without its extension; must contain {id} or its alias {generation_id}",
    )
    image_format: str | None = option(None, "image", "png, jpeg or webp", shown="png")
    image_quality: int | None = option(
        None,
        "image",
        "JPEG quality, 1 … 100; if set, WebP is lossy at this quality; PNG is always lossless",
        shown="95",
    )

    creator: str | None = option(None, "image", "dc:creator in the images' XMP")
    rights: str | None = option(None, "image", "dc:rights in the images' XMP")
    provenance_prompt: Literal["yes", "no"] | None = option(
        None,
        "image",
        "yes: the prompt in the images' XMP, too; no: neither there nor in their parameters",
        shown="in the parameters",
    )
    c2pa_certificate: str | None = option(
        None,
        "image",
        "PEM file, or PEM text, of the certificate chain that signs C2PA manifests",
        in_file=True,
    )
    c2pa_key: str | None = option(
        None, "image", "PEM file, or PEM text, of the private key of --c2pa-certificate", secret=True
    )
    c2pa_timestamp_url: str | None = option(
        None, "image", "URL of an RFC 3161 time-stamping service for the signatures", secret=True
    )

    c2pa_trust_anchors: str | None = option(
        None, "verification", "PEM file of the authorities whose signatures verify calls trusted"
    )

    evaluator: str = option(
        "none",
        "evaluation",
        "evaluator that scores each image: none, clip or clip:MODEL (folder or hub id), gemini or "
        "gemini:MODEL, demo",
    )
    iterations: Annotated[int, Ge(1), Le(MAX_ITERATIONS)] = option(
        1,
        "loop",
        "maximum iterations for each prompt, refined from the second on, until an image reaches --min-score",
    )
    candidates: Annotated[int, Ge(1), Le(MAX_CANDIDATES)] = option(
        1, "loop", "images in each iteration, each with its own seed; the best of all is the result"
    )
    min_score: Annotated[float, Ge(0), Le(1)] | None = option(
        None, "loop", "score from 0 to 1 that ends the iterations", shown="1"
    )
    evaluator_timeout: Annotated[float, Ge(0), Le(86_400)] = option(
        60, "evaluation", "seconds that a run retries an unavailable evaluator before it fails"
    )
    gemini_api_key: str | None = option(None, "evaluation", "API key for --evaluator gemini", secret=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSettings(GenerationSettings):
    """Options for batches, leases, timeouts, workers, metrics, serving, and logs."""

    batch_size: str = option(
        "10", "run", "maximum batch size; auto or auto:N searches for the fastest size up to N (64)"
    )
    run_id: str | None = option(
        None,
        "run",
        "name of the run in documents, logs and callbacks; a task of a job adds its index",
        shown="made",
    )
    max_attempts: Annotated[int, Ge(1)] = option(
        3, "run", "maximum attempts per prompt; only the prompt's own failures count"
    )
    lease_seconds: Annotated[float, Gt(0), Le(86_400)] = option(60, "run", "lease duration in seconds")

    database_patience: Annotated[float, Ge(0), Le(86_400)] = option(
        60, "run", "seconds that a run retries an unavailable database before it fails"
    )
    stall_timeout: Annotated[float, Gt(0), Le(86_400)] = option(
        300, "run", "seconds without a step after which the device counts as hung and the run ends"
    )
    metrics_textfile: str | None = option(
        None, "metrics", ".prom file for node_exporter, written every --metrics-seconds and at the end"
    )
    pushgateway: str | None = option(
        None,
        "metrics",
        "URL of a Prometheus Pushgateway, sent the metrics every --metrics-seconds and at the end",
        secret=True,
    )
    metrics_seconds: Annotated[float, Ge(1), Le(86_400)] = option(
        15, "metrics", "seconds between publications of the metrics, each with a query of the database"
    )
    gpu_hour_price: Annotated[float, Ge(0), Le(1_000_000)] | None = option(
        None, "run", "price of the machine in dollars per hour; adds the cost of 1,000 images to the summary"
    )

    workers: Annotated[int, Ge(1), Le(10_000)] | Literal["auto"] | None = option(
        None,
        "distributed",
        "number of worker processes, run by Ray; auto: one for each GPU, at least one",
        shown="one, in this process",
    )
    ray_address: str | None = option(
        None,
        "distributed",
        "Ray cluster for --workers, auto or HOST:PORT; by default one is started on this machine",
    )

    rabbitmq_url: str | None = option(
        None,
        "serving",
        "amqp://… or amqps://… URL of a RabbitMQ whose messages become prompts; by default only the database "
        "is polled",
        secret=True,
    )
    rabbitmq_host: str | None = option(None, "serving", "short for --rabbitmq-url amqp://HOST")
    rabbitmq_queue: str = option(
        "image_generation", "serving", "queue to consume; created as durable if it does not exist"
    )
    rabbitmq_dead_letter_queue: str | None = option(
        None,
        "serving",
        "queue for invalid messages, with the reason in a header",
        shown="the queue's name and .dead",
    )
    rabbitmq_prefetch: Annotated[int, Ge(1), Le(10_000)] = option(
        100, "serving", "maximum unacknowledged messages, which are being written to the database"
    )
    metrics_port: str | None = option(
        None,
        "serving",
        "PORT or HOST:PORT that serves Prometheus metrics at /metrics; the default host is 127.0.0.1",
    )
    idle_exit: Annotated[float, Gt(0), Le(10_000_000)] | None = option(
        None, "serving", "seconds without work after which the server exits with status 0"
    )
    poll_seconds: Annotated[float, Gt(0), Le(3600)] = option(
        5, "serving", "maximum seconds between polls of an idle database; the first interval is one second"
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = option(
        "INFO", "logging", "DEBUG, INFO, WARNING (or WARN) or ERROR, in any case"
    )
    log_file: str | None = option(
        None, "logging", "file that also receives every log line, as JSON; its folder is created"
    )
    log_format: Literal["auto", "text", "json"] = option(
        "auto", "logging", "auto (text on a terminal, JSON lines with severity elsewhere), text or json"
    )
