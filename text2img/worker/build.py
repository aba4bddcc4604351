"""Build what the commands work with, from the settings."""

from __future__ import annotations

import os
import secrets
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from text2img.concurrency.stages import StageTimer
from text2img.databases import Collections, Database, Selection, open_database
from text2img.databases.sqlite import check_exists
from text2img.engine.inspection import check_fits, fit_parameters
from text2img.engine.loras import LoraCache, SourceAllowlist
from text2img.errors import ConfigurationError, PromptFailed, StorageFailed
from text2img.images import Encoder, Marking, check_statement
from text2img.prompts import Limits, RequestedParameters
from text2img.prompts.ids import HostAllowlist, IterationFolderName, ObjectName
from text2img.prompts.parameters import resolve_parameters
from text2img.prompts.syntax import PromptSyntax
from text2img.settings import DEFAULTS, expand_home
from text2img.storage import (
    ImageStorage,
    StorageOptions,
    locate,
    open_storage,
)
from text2img.telemetry.progress import RunStats
from text2img.telemetry.tracing import NoopTraces
from text2img.worker.leases import ExcludedPrompts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from text2img.concurrency.signals import Stop
    from text2img.databases import Outbox
    from text2img.engine import Engine, EngineOptions, ModelInfo
    from text2img.engine.hosted.engine import HostedEngine
    from text2img.evaluation import Evaluator
    from text2img.images.provenance import ManifestSigner
    from text2img.intake.rabbitmq import Broker
    from text2img.prompts import Failed, ModelConfiguration, Outcome, Parameters
    from text2img.prompts.refinement import Loop
    from text2img.reports.run_files import Sidecars
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress
    from text2img.telemetry.tracing import Traces
    from text2img.webhooks.client import CallbackClient, Webhooks
    from text2img.webhooks.dispatcher import RunNotifier
    from text2img.worker.leases import Leases
    from text2img.worker.polling import WorkSource
    from text2img.worker.watchdog import Watchdog


@dataclass(frozen=True, slots=True, kw_only=True)
class Dependencies:
    """What a worker works with, built once from the settings. Each part has checked its own settings.

    ``batch_size`` is the maximum; with ``fastest_size`` the run finds out which size up to it is fastest.
    With a ``loop`` an image is refined until the evaluator accepts it. ``callback`` and ``webhooks`` are the
    clients for the run's receiver and for prompts' own webhooks, which may be on ``webhook_hosts`` only.
    ``limit`` is the maximum number of prompts of a run, ``limits`` what each of them may request, and
    ``syntax`` what happens to texts with other programs' syntax.
    """

    storage: ImageStorage
    encoder: Encoder = field(default_factory=Encoder)
    evaluator: Evaluator | None = None
    evaluator_timeout: float = 60
    loras: LoraCache = field(default_factory=LoraCache)
    webhook_hosts: HostAllowlist = field(default_factory=HostAllowlist)
    callback: CallbackClient | None = None
    webhooks: Webhooks | None = None
    selection: Selection = field(default_factory=Selection)
    object_name: ObjectName | IterationFolderName = field(default_factory=ObjectName)
    loop: Loop | None = None
    batch_size: int = 10
    fastest_size: bool = False
    limit: int | None = None
    limits: Limits = field(default_factory=Limits)
    syntax: PromptSyntax = field(default_factory=PromptSyntax)
    max_attempts: int = 3
    upload_workers: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext:
    """One worker's run. ``worker`` is the name in its claims; ``waiting`` is how many prompts were claimable
    when the run began.

    ``recorded`` is called with outcomes once they are recorded. ``serving`` waits for more work when none is
    left; without it the run ends then. ``more(wanted)`` requests a part of the run's limit from the pool,
    where several workers share it. ``notify``: outcomes are kept for the callback. ``unwritable`` is called
    with a failure whose document cannot be written, to notify of it all the same.
    """

    run_id: str
    worker: str
    database: Database
    leases: Leases
    watchdog: Watchdog
    progress: Progress
    stop: Stop
    recorded: Callable[[Sequence[Outcome]], None]
    unwritable: Callable[[Failed], None] = lambda _: None
    excluded: ExcludedPrompts = field(default_factory=ExcludedPrompts)
    stats: RunStats = field(default_factory=RunStats)
    seconds: StageTimer = field(default_factory=StageTimer)
    traces: Traces = field(default_factory=NoopTraces)
    waiting: int = 0
    notify: bool = False
    serving: WorkSource | None = None
    more: Callable[[int], int] | None = None

    def will_make(self, limit: int | None) -> int:
        """Return how many prompts the run will make, as far as could be known at its start."""
        return self.waiting if limit is None else min(self.waiting, limit)


def build(settings: Settings, wait: Callable[[float], None] = time.sleep) -> Dependencies:
    """Build everything that the settings alone determine, without a query or request to anything.

    ``wait`` sleeps, and raises when the run is to end. Raises ConfigurationError for the first setting that
    is wrong. The database, which is reached as it is opened, and the engine, whose model may be named in the
    database, have functions of their own.
    """
    hosts = webhook_hosts(settings)
    return Dependencies(
        storage=storage(settings),
        callback=callback(settings),
        webhook_hosts=hosts,
        webhooks=webhooks(settings, hosts),
        encoder=encoder(settings),
        loras=loras(settings, wait),
        evaluator=evaluator(settings),
        evaluator_timeout=settings.evaluator_timeout,
        object_name=settings.object_names,
        loop=settings.loop,
        selection=selection(settings),
        batch_size=settings.batches.max_size,
        fastest_size=settings.batches.auto,
        limit=settings.limit,
        limits=settings.limits,
        syntax=prompt_syntax(settings),
        max_attempts=settings.max_attempts,
        upload_workers=settings.upload_workers,
    )


def database(settings: Settings, *, url: str | None = None, create: bool = True) -> Database:
    """Open the database of the settings, or of ``url``; with ``create``, make its tables and indexes."""
    collections = Collections(
        datasets=settings.datasets_collection,
        model_configs=settings.model_configs_collection,
        dataset_records=settings.dataset_records_collection,
        runs=settings.runs_collection,
        callbacks=settings.callbacks_collection,
    )
    place = url or settings.database_url
    if create and url is None and settings.folder:
        _make_folder(settings.folder)
    return open_database(place, collections, create=create)


def require_database(settings: Settings, *, may_create: bool = False) -> None:
    """Raise DatabaseMissing for a SQLite file that does not exist, unless the command may create it.

    ``--output-dir`` and ``--input-file`` create it, since they define what is to be in it.
    """
    if not (may_create or settings.folder or settings.input_file):
        check_exists(settings.database_url)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StorageFailed(f"{folder} cannot be made: {exc.strerror}; choose another --output-dir") from exc


def storage(settings: Settings) -> ImageStorage:
    """Return the storage of the images, without connecting to it."""
    options = StorageOptions(
        acl=settings.acl, public_urls=settings.public_urls, s3_endpoint=settings.s3_endpoint
    )
    return open_storage(settings.output_url, options)


def check_output_folder(settings: Settings) -> None:
    """Raise ConfigurationError if another program's file is where the run would write its summary.

    Touches nothing. A bucket is not looked at; see ``check_output_bucket``.
    """
    if settings.folders and "://" not in settings.output_url:
        from text2img.reports.run_files import check_summary_folder

        check_summary_folder(expand_home(settings.output_url, "--output"))


def check_output_bucket(settings: Settings, deps: Dependencies) -> None:
    """Raise ConfigurationError as ``check_output_folder`` does, for a bucket; what may not be read passes."""
    if settings.folders and (place := locate(settings.output_url, "--output")) is not None:
        from text2img.reports.run_files import check_summary_bucket

        check_summary_bucket(place, deps.storage)


def sidecars(deps: Dependencies, run: RunContext) -> Sidecars | None:
    """Return what writes files beside the images in a layout of folders; None for a flat layout."""
    if not isinstance(deps.object_name, IterationFolderName):
        return None
    from text2img.reports.run_files import Sidecars

    return Sidecars(deps.storage, deps.object_name, run.database.queue.holds)


def prompt_syntax(settings: Settings) -> PromptSyntax:
    """Return the check for syntax of other programs. Raises ConfigurationError if the run's own has it."""
    syntax = PromptSyntax(refuse=settings.prompt_syntax == "refuse")
    try:
        syntax.check(None, settings.negative_prompt)
    except PromptFailed as exc:
        raise ConfigurationError(f"--negative-prompt (NEGATIVE_PROMPT): {exc}") from None
    return syntax


def selection(settings: Settings) -> Selection:
    """Return the selection of prompts that the command works on."""
    return Selection(settings.dataset_id)


def callback(settings: Settings) -> CallbackClient | None:
    """Return the client of the run's receiver; None without --callback-url."""
    if not settings.callback_url:
        return None
    from text2img.webhooks.client import CallbackClient

    return CallbackClient(
        settings.callback_url, secret=settings.callback_secret, token=settings.callback_token
    )


def webhook_hosts(settings: Settings) -> HostAllowlist:
    """Return the hosts that prompts' own webhooks may be on."""
    return HostAllowlist.parse(settings.webhook_host)


def webhooks(settings: Settings, hosts: HostAllowlist) -> Webhooks | None:
    """Return the client of prompts' own webhooks; None where no host is allowed."""
    if not hosts.rules:
        return None
    from text2img.webhooks.client import Webhooks
    from text2img.webhooks.payloads import Credentials

    return Webhooks(hosts, Credentials(settings.callback_secret, settings.callback_token))


def notifier(
    deps: Dependencies, outbox: Outbox, run_id: str, worker: str, *, every: float | None = None
) -> RunNotifier:
    """Return what notifies the run's receiver and prompts' own webhooks of recorded outcomes.

    The receiver is notified of 1,000 outcomes at once, and also after ``every`` seconds, where given.
    """
    from text2img.webhooks.dispatcher import NotifyTargets, RunNotifier

    return RunNotifier(outbox, NotifyTargets(deps.callback, deps.webhooks, every), run_id, worker)


def broker(settings: Settings) -> Broker | None:
    """Return the RabbitMQ broker, without connecting to it; None where none is configured."""
    url = settings.broker_url
    if url is None:
        return None
    from text2img.intake.rabbitmq import Broker

    dead = settings.rabbitmq_dead_letter_queue or f"{settings.rabbitmq_queue}.dead"
    return Broker(url, settings.rabbitmq_queue, dead, settings.rabbitmq_prefetch)


def check_device(settings: Settings) -> None:
    """Check the device, or the options of the hosted generator, as far as that takes no time."""
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
    """Return the engine: a hosted generator, or the model of the settings; ``wait`` as in ``loras``."""
    if settings.hosted_model is not None:
        return hosted(settings, configuration)
    return _local(settings, configuration, wait)


def hosted(settings: Settings, configuration: ModelConfiguration | None) -> HostedEngine:
    """Return the engine of a hosted generator, without connecting to it.

    Raises ConfigurationError where there is no key, and for options that only a local model supports.
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
            retry_timeout=settings.generator_patience,
            stall_timeout=settings.stall_timeout,
            max_pixels=settings.max_pixels,
        )
    )


def _check_hosted(settings: Settings, configuration: ModelConfiguration | None) -> None:
    """Reject options that only a local model supports."""
    given = {
        "--model-id (MODEL_ID)": settings.model_id,
        "--model-revision (MODEL_REVISION)": settings.model_revision,
        "--model-base (MODEL_BASE)": settings.model_base,
        "--variant (VARIANT)": settings.variant,
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


def model_at_hand(settings: Settings, configuration: ModelConfiguration | None) -> ModelInfo | None:
    """Return the facts about the model of the settings; None for one that this machine would have to fetch.

    Nothing is fetched or loaded. Raises the errors of ``Engine.inspect``.
    """
    from text2img.engine import diffusers
    from text2img.engine.loading import find_here

    class Elsewhere(Exception):  # noqa: N818 - it is an answer
        """The model, or the base of a single file, is not on this machine."""

    def find(options: EngineOptions) -> tuple[Path, str | None]:
        if (place := find_here(options)) is None:
            raise Elsewhere
        return place

    try:
        return diffusers.DiffusersEngine(_engine_options(settings, configuration), find).inspect()
    except Elsewhere:
        return None


def _local(
    settings: Settings, configuration: ModelConfiguration | None, wait: Callable[[float], None]
) -> Engine:
    """Return the engine of the model: the flag's, else the configuration's, else the default."""
    from text2img.engine.diffusers import DiffusersEngine
    from text2img.engine.models import ModelCache

    return DiffusersEngine(
        _engine_options(settings, configuration),
        ModelCache(
            lambda: _kept(settings.model_cache, "models", "--model-cache (MODEL_CACHE)"),
            wait,
            s3_endpoint=settings.s3_endpoint,
        ).find,
    )


def _engine_options(settings: Settings, configuration: ModelConfiguration | None) -> EngineOptions:
    from text2img.engine import EngineOptions
    from text2img.prompts import ModelConfiguration
    from text2img.settings import DEFAULT_MODEL

    configuration = configuration or ModelConfiguration()
    # The configuration's revision, variant and approximations belong to its own model only.
    ours = configuration if settings.model_id is None else ModelConfiguration()
    every = ours.feature_cache if settings.feature_cache is None else settings.feature_cache
    return EngineOptions(
        model=settings.model_id or configuration.model_path or DEFAULT_MODEL,
        revision=settings.model_revision or ours.revision,
        base=settings.model_base,
        variant=settings.variant or ours.variant,
        device=settings.device,
        dtype=settings.dtype,
        safety_checker=configuration.safety_checker,
        compile=settings.compile,
        compile_cache=settings.compile_cache,
        offload=settings.offload,
        feature_cache=every or 0,
        autoencoder=settings.autoencoder or ours.autoencoder,
    )


def _kept(folder: str | None, name: str, option: str) -> Path:
    """Return the folder that keeps downloads for later runs: ``folder``, or one in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand_home(folder or f"{home}/text2img/{name}", option)


def evaluator(settings: Settings) -> Evaluator | None:
    """Return the evaluator; None without one. Raises ConfigurationError for an unknown one."""
    kind, colon, model = settings.evaluator.partition(":")
    chosen = [model] if model else []
    if kind == "clip" and (model or not colon):
        from text2img.evaluation.clip import ClipEvaluator

        return ClipEvaluator(*chosen)
    if kind == "gemini" and (model or not colon):
        from text2img.evaluation.gemini import GeminiEvaluator

        return GeminiEvaluator(settings.gemini_api_key, *chosen, timeout=settings.evaluator_timeout)
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
    """Return the LoRA cache; ``wait`` sleeps, and raises when the run is to end. Touches no file yet."""
    from text2img.engine.loras.cache import Cache

    sources = SourceAllowlist.parse(settings.lora_source)
    cache = None
    if sources.needs_cache:
        folder = _kept(settings.lora_cache, "loras", "--lora-cache (LORA_CACHE)")
        cache = Cache(folder, round(settings.lora_cache_size * 1e9), wait)
    return LoraCache(sources, cache, wait, s3_endpoint=settings.s3_endpoint)


def encoder(settings: Settings) -> Encoder:
    """Return the encoder, which draws signatures and makes the images' files."""
    prompt = {"yes": True, "no": False, None: None}[settings.provenance_prompt]
    marking = Marking(
        creator=check_statement("--creator (CREATOR)", settings.creator),
        rights=check_statement("--rights (RIGHTS)", settings.rights),
        prompt=prompt,
    )
    return Encoder(settings.signature_font, marking, manifest_signer(settings))


def manifest_signer(settings: Settings) -> ManifestSigner | None:
    """Return the signer of C2PA manifests, None where none is configured."""
    certificate, key, url = settings.c2pa_certificate, settings.c2pa_key, settings.c2pa_timestamp_url
    if not (certificate or key or url):
        return None
    if not (certificate and key):
        raise ConfigurationError(
            "C2PA manifests need --c2pa-certificate (C2PA_CERTIFICATE) and --c2pa-key (C2PA_KEY); give both"
        )
    from text2img.images.provenance import ManifestSigner

    return ManifestSigner(certificate, key, url)


def worker_name() -> str:
    """Return a unique name for a worker's claims: host, process and a random suffix."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def run_defaults(
    settings: Settings, model_info: ModelInfo, configuration: ModelConfiguration | None
) -> tuple[RequestedParameters, ...]:
    """Return the run's own parameters, the most specific first."""
    configured = configuration.requested if configuration else RequestedParameters()
    own_size = RequestedParameters(width=model_info.width, height=model_info.height)
    return (settings.requested, configured, model_info.requested, DEFAULTS, own_size)


def validate_defaults(
    deps: Dependencies, model_info: ModelInfo, requested: tuple[RequestedParameters, ...]
) -> Parameters:
    """Return the parameters of an image whose prompt requests nothing, as the model will be called.

    Its seed has no meaning.

    Raises ConfigurationError where they cannot be met: no image would succeed.
    """
    try:
        wanted = resolve_parameters(requested, seed=0, multiple=model_info.multiple)
        check_fits(model_info, wanted)
        wanted, _ = fit_parameters(model_info, wanted)
    except PromptFailed as exc:
        raise ConfigurationError(f"the run's own parameters do not fit the model: {exc}") from None
    try:
        deps.limits.check(wanted)
    except PromptFailed as exc:
        raise ConfigurationError(f"the run's own parameters exceed its limits: {exc}") from None
    if deps.loop and wanted.num_images > 1:
        raise ConfigurationError(
            f"the model configuration's num_images is {wanted.num_images}, and the loop (--iterations,"
            " --candidates, --min-score) keeps one picture of a prompt; give --num-images 1"
        )
    try:
        deps.encoder.check(wanted)
    except PromptFailed as exc:
        raise ConfigurationError(f"the run's own signature cannot be drawn: {exc}") from None
    try:
        for lora in wanted.loras:
            deps.loras.check(lora)
    except PromptFailed as exc:
        raise ConfigurationError(f"the model configuration's LoRA cannot be used: {exc}") from None
    return wanted
