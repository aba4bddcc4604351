"""Builds what the commands work with from the settings."""

from __future__ import annotations

import os
import secrets
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from text2img.databases import Collections, Database, Selection, open_database
from text2img.engine.inspection import check_fits
from text2img.engine.loras import LoraCache
from text2img.errors import ConfigurationError, PromptFailed, StorageFailed
from text2img.images import Encoder
from text2img.prompts import RequestedParameters
from text2img.prompts.ids import IterationFolderName, ObjectName
from text2img.prompts.parameters import resolve_parameters
from text2img.prompts.webhook_urls import HostAllowlist
from text2img.settings import DEFAULTS
from text2img.storage import ImageStorage, StorageOptions, open_storage
from text2img.telemetry.tracing import NoopTraces

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from text2img.concurrency.stages import StageTimer
    from text2img.engine import Engine, ModelInfo
    from text2img.engine.hosted.engine import HostedEngine
    from text2img.evaluation import Evaluator
    from text2img.intake.rabbitmq import Broker
    from text2img.prompts import Claim, ModelConfiguration, Outcome, Parameters
    from text2img.prompts.refinement import Loop
    from text2img.reports.run_files import Sidecars
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress
    from text2img.telemetry.tracing import Traces
    from text2img.webhooks.client import CallbackClient, Webhooks
    from text2img.webhooks.policies import RunNotifier
    from text2img.worker.leases import Leases
    from text2img.worker.polling import WorkSource
    from text2img.worker.watchdog import Watchdog


def database(settings: Settings, *, url: str | None = None, create: bool = True) -> Database:
    """The database (or the one of ``url``), opened; with ``create`` its tables and indexes are made."""
    collections = Collections(
        datasets=settings.datasets_collection,
        model_configs=settings.model_configs_collection,
        dataset_records=settings.dataset_records_collection,
        runs=settings.runs_collection,
        callbacks=settings.callbacks_collection,
    )
    place = url or settings.database_url
    if create and url is None and settings.folder:
        _made_ready(settings.folder)
    return open_database(place, collections, create=create)


def _made_ready(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StorageFailed(f"{folder} cannot be made: {exc.strerror}; choose another --output-dir") from exc


def storage(settings: Settings) -> ImageStorage:
    """Where pictures go. Touches no network yet."""
    options = StorageOptions(
        acl=settings.acl, public_urls=settings.public_urls, s3_endpoint=settings.s3_endpoint
    )
    return open_storage(settings.output_url, options)


def sidecars(settings: Settings, storage: ImageStorage, holds: Callable[[Claim], bool]) -> Sidecars | None:
    """What writes beside the pictures in a layout of folders; None in a flat one."""
    from text2img.prompts.ids import IterationFolderName
    from text2img.reports.run_files import Sidecars

    names = settings.object_names
    return Sidecars(storage, names, holds) if isinstance(names, IterationFolderName) else None


def selection(settings: Settings) -> Selection:
    """Which prompts the command is about."""
    return Selection(settings.dataset_id)


def receiver(settings: Settings) -> CallbackClient | None:
    """Who is told of results; None where nobody asked to be."""
    if not settings.callback_url:
        return None
    from text2img.webhooks.client import CallbackClient

    return CallbackClient(
        settings.callback_url, secret=settings.callback_secret, token=settings.callback_token
    )


def webhook_hosts(settings: Settings) -> HostAllowlist:
    """The hosts that prompts' own webhooks may be on."""
    return HostAllowlist.parse(settings.webhook_host)


def webhooks(settings: Settings) -> Webhooks | None:
    """Who sends to prompts' own webhooks; None where no host may be told."""
    hosts = webhook_hosts(settings)
    if not hosts.rules:
        return None
    from text2img.webhooks.client import Webhooks
    from text2img.webhooks.payloads import Credentials

    return Webhooks(hosts, Credentials(settings.callback_secret, settings.callback_token))


def teller(
    settings: Settings, database: Database, run_id: str, worker: str, *, every: float | None = None
) -> RunNotifier:
    """Who tells the receiver, and prompts' own webhooks, of what is recorded, nobody where there is none; the
    receiver also ``every`` so many seconds.
    """
    from text2img.webhooks.dispatcher import WebhookDispatcher
    from text2img.webhooks.policies import NotifyTargets, RunNotifier

    own = webhooks(settings)
    courier = None if own is None else WebhookDispatcher(database, own, worker)
    return RunNotifier(database, NotifyTargets(receiver(settings), courier, every), run_id, worker)


def broker(settings: Settings) -> Broker | None:
    """The queue whose messages become prompts; None where nobody named one. Touches no network yet."""
    url = settings.broker_url
    if url is None:
        return None
    from text2img.intake.rabbitmq import Broker

    dead = settings.rabbitmq_dead_letter_queue or f"{settings.rabbitmq_queue}.dead"
    return Broker(url, settings.rabbitmq_queue, dead, settings.rabbitmq_prefetch)


def check_device(settings: Settings) -> None:
    """Raise what is wrong with where the pictures are to be drawn, as far as that takes no time."""
    if settings.hosted_model is not None:
        hosted(settings, None)
        return
    from text2img.engine.devices import check_device

    check_device(settings.device)


def check_workers(settings: Settings) -> None:
    """Raise ConfigurationError where several workers cannot be had, as far as that takes no time."""
    if settings.workers is None:
        return
    from text2img.worker.ray import process

    process.check(settings.ray_address)
    if not process.is_here(settings.ray_address):
        check_shared(settings)


def check_shared(settings: Settings) -> None:
    """Raise ConfigurationError for what workers on several machines cannot share."""
    if settings.database_url.lower().startswith("sqlite:"):
        raise ConfigurationError(
            "SQLite is a file on one machine, and the Ray cluster has several; use MongoDB (--mongo-uri)"
        )
    if "://" not in settings.output_url:
        raise ConfigurationError(
            "a folder is on one machine, and the Ray cluster has several; let --output be a bucket"
        )


def engine(
    settings: Settings, configuration: ModelConfiguration | None, wait: Callable[[float], None] = time.sleep
) -> Engine:
    """What draws: the hosted generator, or the engine for the model that wins; ``wait`` as in ``loras``."""
    if settings.hosted_model is not None:
        return hosted(settings, configuration)
    return _local(settings, configuration, wait)


def hosted(settings: Settings, configuration: ModelConfiguration | None) -> HostedEngine:
    """The engine that asks a hosted generator. Touches no network yet.

    Raises ConfigurationError where there is no key, and for options that mean a model that is loaded here.
    """
    from text2img.engine.hosted import HostedOptions
    from text2img.engine.hosted.engine import HostedEngine

    _check_hosted(settings, configuration)
    if not settings.fal_ai_api_key:
        raise ConfigurationError(
            f"--generator {settings.generator} needs a key; set FAL_AI_API_KEY (or FAL_KEY)"
        )
    return HostedEngine(
        HostedOptions(
            model=settings.hosted_model or "",
            key=settings.fal_ai_api_key,
            url=settings.generator_url,
            safety_checker=configuration is None or configuration.safety_checker,
            patience=settings.generator_patience,
            stall_timeout=settings.stall_timeout,
        )
    )


def _check_hosted(settings: Settings, configuration: ModelConfiguration | None) -> None:
    """What only a model that is loaded here could heed would be a wish that nobody fulfils."""
    given = {
        "--model-id (MODEL_ID)": settings.model_id,
        "--model-revision (MODEL_REVISION)": settings.model_revision,
        "--feature-cache (FEATURE_CACHE)": settings.feature_cache,
        "--autoencoder (AUTOENCODER)": settings.autoencoder,
        "--compile always (COMPILE)": settings.compile == "always",
        "--offload (OFFLOAD)": settings.offload != "none",
        "--scheduler (SCHEDULER)": settings.scheduler,
        "the model configuration's lora": configuration and configuration.requested.lora,
    }
    for name, value in given.items():
        if value:
            raise ConfigurationError(
                f"{name} means a model that is loaded here, and does nothing for --generator"
                f" {settings.generator}; leave one of them out"
            )


def _local(
    settings: Settings, configuration: ModelConfiguration | None, wait: Callable[[float], None]
) -> Engine:
    """The engine for the model that wins: the flag's, then the configuration's, then the default."""
    from text2img.engine import EngineOptions
    from text2img.engine.diffusers import DiffusersEngine
    from text2img.engine.models import ModelCache
    from text2img.prompts import ModelConfiguration
    from text2img.settings import DEFAULT_MODEL

    configuration = configuration or ModelConfiguration()
    # Another model than the configuration's has none of its revision, variant and approximations.
    ours = configuration if settings.model_id is None else ModelConfiguration()
    every = ours.feature_cache if settings.feature_cache is None else settings.feature_cache
    return DiffusersEngine(
        EngineOptions(
            model=settings.model_id or configuration.model_path or DEFAULT_MODEL,
            revision=settings.model_revision or ours.revision,
            variant=ours.variant,
            device=settings.device,
            dtype=settings.dtype,
            safety_checker=configuration.safety_checker,
            compile=settings.compile,
            compile_cache=settings.compile_cache,
            offload=settings.offload,
            feature_cache=every or 0,
            autoencoder=settings.autoencoder or ours.autoencoder,
        ),
        ModelCache(_kept(settings.model_cache, "models"), wait, s3_endpoint=settings.s3_endpoint).find,
    )


def _kept(folder: str | None, name: str) -> Path:
    """Where what was fetched stays for later runs, unless the settings name a ``folder``."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder or f"{home}/text2img/{name}").expanduser()


def evaluator(settings: Settings) -> Evaluator | None:
    """What scores pictures; None where nobody asked for it. Raises ConfigurationError for what is none."""
    kind, colon, model = settings.evaluator.partition(":")
    chosen = [model] if model else []
    if kind == "clip" and (model or not colon):
        from text2img.evaluation.clip import ClipEvaluator

        return ClipEvaluator(*chosen)
    if kind == "gemini" and (model or not colon):
        from text2img.evaluation.gemini import GeminiEvaluator

        return GeminiEvaluator(settings.gemini_api_key, *chosen)
    if settings.evaluator == "demo":
        from text2img.evaluation.demo import DemoEvaluator

        return DemoEvaluator()
    if settings.evaluator != "none":
        raise ConfigurationError(
            "--evaluator (EVALUATOR): it should be none, clip, clip:MODEL, gemini, gemini:MODEL or demo;"
            f" it is {settings.evaluator[:60]!r}"
        )
    return None


def loras(settings: Settings, wait: Callable[[float], None] = time.sleep) -> LoraCache:
    """What gets LoRAs; ``wait`` sleeps, and raises when the run is to end. Touches no network and no file."""
    from text2img.engine.loras import LoraCache, SourceAllowlist
    from text2img.engine.loras.cache import Cache

    cache = Cache(_kept(settings.lora_cache, "loras"), round(settings.lora_cache_size * 1e9), wait)
    sources = SourceAllowlist.parse(settings.lora_source)
    return LoraCache(sources, cache, wait, s3_endpoint=settings.s3_endpoint)


def encoder(settings: Settings) -> Encoder:
    """What signs pictures and writes their files."""
    from text2img.images import Encoder

    return Encoder(settings.signature_font)


def worker_name() -> str:
    """Who claims: the host, the process, and a mark that no other worker has."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one run shall do. ``wishes`` are the run's own, the most specific first.

    ``multiple`` is what a size must be a multiple of, as the model wants it.
    ``batch_size`` is the largest; with ``fastest_size`` the run finds out which size up to it is fastest.
    With a ``loop`` prompts are drawn until an evaluator is content.
    ``waiting`` is how many prompts could be claimed when the run began, ``limit`` how many it takes at most.
    """

    run_id: str
    worker: str
    selection: Selection
    requested: Sequence[RequestedParameters]
    batch_size: int = 10
    fastest_size: bool = False
    waiting: int = 0
    limit: int | None = None
    max_attempts: int = 3
    upload_workers: int = 16
    tell: bool = False
    multiple: int = 8
    object_name: ObjectName | IterationFolderName = field(default_factory=ObjectName)
    loop: Loop | None = None

    @property
    def to_make(self) -> int:
        """How many prompts the run will make, as far as could be known at its start."""
        return self.waiting if self.limit is None else min(self.waiting, self.limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDeps:
    """What a worker works with. The engine is inspected and not yet loaded; all else is ready to use.

    ``seconds`` adds up the stages' time; ``recorded`` is called with the outcomes that were; prompts may
    have webhooks on ``webhook_hosts`` alone. ``serving`` waits for more where nothing is left; without it the
    run ends then. ``more(wanted)`` is asked for a share of the run's limit, where others work at it as well.
    """

    database: Database
    storage: ImageStorage
    engine: Engine
    model_info: ModelInfo
    leases: Leases
    watchdog: Watchdog
    progress: Progress
    seconds: StageTimer
    recorded: Callable[[Sequence[Outcome]], None]
    traces: Traces = field(default_factory=NoopTraces)
    encoder: Encoder = field(default_factory=Encoder)
    evaluator: Evaluator | None = None
    sidecars: Sidecars | None = None
    loras: LoraCache = field(default_factory=LoraCache)
    webhook_hosts: HostAllowlist = field(default_factory=HostAllowlist)
    serving: WorkSource | None = None
    more: Callable[[int], int] | None = None


def run_defaults(
    settings: Settings, model_info: ModelInfo, configuration: ModelConfiguration | None
) -> tuple[RequestedParameters, ...]:
    """What the run wishes for every picture, the most specific first."""
    configured = configuration.requested if configuration else RequestedParameters()
    own_size = RequestedParameters(width=model_info.width, height=model_info.height)
    return (settings.requested, configured, model_info.requested, DEFAULTS, own_size)


def validate_defaults(
    settings: Settings, model_info: ModelInfo, requested: tuple[RequestedParameters, ...]
) -> Parameters:
    """What they come to; its seed means nothing.

    Raises ConfigurationError for what cannot be done: no picture would succeed.
    """
    signer, library = encoder(settings), loras(settings)
    try:
        wanted = resolve_parameters(requested, seed=0, multiple=model_info.multiple)
        check_fits(model_info, wanted)
    except PromptFailed as exc:
        raise ConfigurationError(f"the run's own parameters do not fit the model: {exc}") from None
    if settings.loop and wanted.num_images > 1:
        raise ConfigurationError(
            f"the model configuration's num_images is {wanted.num_images}, and the loop (--iterations,"
            " --candidates, --min-score) keeps one picture of a prompt; give --num-images 1"
        )
    try:
        signer.check(wanted)
    except PromptFailed as exc:
        raise ConfigurationError(f"the run's own signature cannot be drawn: {exc}") from None
    try:
        for lora in wanted.loras:
            library.check(lora)
    except PromptFailed as exc:
        raise ConfigurationError(f"the model configuration's LoRA cannot be used: {exc}") from None
    return wanted
