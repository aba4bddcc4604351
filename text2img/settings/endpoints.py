"""Options that say where prompts come from, and where pictures and news of them go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from text2img.settings.option import option


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
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
