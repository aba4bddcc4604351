"""``doctor``: check every dependency of a run, one line each, without a lasting change."""

from __future__ import annotations

import socket
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, TypedDict

from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import DatabaseMissing, ModelFailed, RunFailed, Text2ImgError
from text2img.telemetry import publisher
from text2img.telemetry.terminal import print_lines, print_result
from text2img.worker import build
from text2img.worker.job import steps_and_guidance, task_instance

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from text2img.engine import ModelInfo
    from text2img.prompts import ModelConfiguration
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress


_DNS_TIMEOUT = 5.0  # seconds to look up a host name


class _Result(TypedDict):
    """The result of a check; ``status`` is the exit status of its failure, ``message`` what it found."""

    name: str
    ok: bool
    status: int
    message: str


class _Doctor:
    """The checks; each returns its finding, or raises the error."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Only its own check is to report a certificate that cannot sign.
        self._unsigned = replace(settings, c2pa_certificate=None, c2pa_key=None, c2pa_timestamp_url=None)
        self._configuration: ModelConfiguration | None = None
        self.model_info: ModelInfo | None = None

    def database(self) -> str:
        """Connect, count the waiting prompts, try the writes of a run, and read the model configuration."""
        settings = self._settings
        try:
            build.require_database(settings, may_create=settings.broker_url is not None)
            opened = build.database(settings, create=False)
        except DatabaseMissing:
            if not (settings.folder or settings.input_file or settings.broker_url):
                raise
            return "does not exist yet; the run creates it"
        with closing(opened) as database:
            waiting = database.queue.pending(build.selection(self._settings))
            database.queue.check_results()
            database.queue.check_claim(build.selection(self._settings))
            self._configuration = database.runs.model_configuration(self._settings.model_config_id)
        return f"prompts waiting: {waiting}"

    def storage(self) -> str:
        """Write an object and delete it again."""
        deps = build.build(self._unsigned)
        deps.storage.check()
        deps.storage.check_writable()
        build.check_output_folder(self._settings)
        build.check_output_bucket(self._settings, deps)
        return f"{self._settings.output_url} is writable"

    def device(self) -> str:
        """Check that the device is available."""
        build.check_device(self._settings)
        return f"{self._settings.device} is available"

    def model(self) -> str:
        """Find the model, and check it as far as is possible without loading its weights."""
        model_info = self.model_info = build.engine(self._settings, self._configuration).inspect()
        parts = [f"{model_info.name}, {model_info.width}×{model_info.height}, {model_info.scheduler}"]
        for source in dict.fromkeys(model_info.sources.values()):
            names = [name for name, each in model_info.sources.items() if each == source]
            parts.append(f"from {source}: {', '.join(names)}")
        return "; ".join(parts)

    def generator(self) -> str:
        """Query the hosted generator's price, which needs the key and costs nothing."""
        hosted = build.hosted(self._settings, self._configuration)
        price, self.model_info = hosted.check_access(), hosted.inspect()
        return price

    def callback(self) -> str:
        """Connect to the receiver without sending it a result."""
        from text2img.webhooks.delivery import DeliveryStatus

        receiver = build.callback(self._settings)
        if receiver is None:
            return "not configured"
        verdict = receiver.ping()
        if verdict.status is not DeliveryStatus.DELIVERED:
            raise RunFailed(verdict.detail)
        return verdict.detail

    def evaluator(self) -> str:
        """Check the evaluator, and have a service score a small image."""
        evaluator = build.evaluator(self._settings)
        if evaluator is None:
            return "not configured"
        evaluator.check()
        evaluator.try_call()
        return evaluator.name

    def images(self) -> str:
        """Resolve the parameters of an image whose prompt sets none."""
        if self.model_info is None:
            raise ModelFailed("the parameters cannot be resolved without a model")
        defaults = build.run_defaults(self._settings, self.model_info, self._configuration)
        parameters = build.validate_defaults(build.build(self._unsigned), self.model_info, defaults)
        used = parameters.num_inference_steps, parameters.guidance_scale
        own = self.model_info.requested.num_inference_steps, self.model_info.requested.guidance_scale
        source = f" ({self.model_info.defaults_from})" if used == own else ""
        return f"{parameters.width}×{parameters.height}, {steps_and_guidance(parameters)}{source}"

    def loras(self) -> str:
        """Write to the LoRAs' cache folder."""
        build.loras(self._settings).check_cache()
        return f"from {self._settings.lora_source}"

    def webhooks(self) -> str:
        """Look up the allowed hosts of prompts' own webhooks; nothing is sent to them."""
        hosts = build.webhook_hosts(self._settings)
        for host, port in hosts.exact_hosts:
            _check_address(host, port)
        return f"allowed hosts: {hosts}"

    def rabbitmq(self) -> str:
        """Connect to the broker, and query the queues."""
        broker = build.broker(self._settings)
        return "not configured" if broker is None else broker.describe_queues()

    def metrics(self) -> str:
        """Check the destinations of metrics; nothing is written or pushed."""
        port = ["--metrics-port"] if self._settings.metrics_address else []
        return ", ".join(
            [
                *(sink.name for sink in publisher.metrics_sinks(self._settings, task_instance())),
                *port,
            ]
        )

    def manifest(self) -> str:
        """Sign a small image, with a time stamp where there is a service, and verify it."""
        signer = build.manifest_signer(self._settings)
        return "not configured" if signer is None else signer.check_timestamps()

    def signature(self) -> str:
        """Read the signature's font, and check for the library that shapes all scripts."""
        from text2img.images.signature import Signer

        font = Signer(self._settings.signature_font).font
        limits = (
            ""
            if font.shaping
            else "; without libfribidi, names that are right to left, joined or with marks cannot be drawn"
        )
        return f"{font.name} has {font.size:,} characters{limits}"

    def keys(self) -> str:
        """List the keys and tokens that are set while no option of this configuration uses them."""
        return "; ".join(
            f"{name} has no effect without {option}" for name, option in _unused_keys(self._settings)
        )


def _unused_keys(settings: Settings) -> list[tuple[str, str]]:
    """Return the variable of each key that is set and not used, and the option that would use it."""
    receiver = settings.callback_url or settings.webhook_host
    output = settings.output or (settings.s3_bucket and "s3://") or ""
    uses_s3 = output.startswith("s3://") or any(
        "s3://" in (place or "") for place in (settings.model_id, settings.lora_source)
    )
    keys = (
        ("FAL_AI_API_KEY", settings.fal_ai_api_key, settings.hosted_model, "--generator fal:MODEL"),
        (
            "GEMINI_API_KEY",
            settings.gemini_api_key,
            settings.evaluator.startswith("gemini"),
            "--evaluator gemini",
        ),
        ("INTERNAL_API_TOKEN", settings.callback_token, receiver, "--callback-url or --webhook-host"),
        ("CALLBACK_SECRET", settings.callback_secret, receiver, "--callback-url or --webhook-host"),
        ("S3_ENDPOINT", settings.s3_endpoint, uses_s3, "--s3-bucket or another s3:// URL"),
    )
    return [(name, option) for name, value, used, option in keys if value and not used]


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Print a line for each check; return the exit status of the first that failed."""
    del arguments, progress
    results = [_run_check(check, settings) for check in _checks(_Doctor(settings), settings)]
    failed = next((result for result in results if not result["ok"]), None)
    status = failed["status"] if failed else 0
    error = {"error": f"{failed['name']}: {failed['message']}"} if failed else {}
    print_result({"status": status, **error, "checks": results})
    return status


def _checks(doctor: _Doctor, settings: Settings) -> Iterator[Callable[[], str]]:
    """Yield the checks in order: the later ones depend on what the earlier ones found."""
    yield from (doctor.database, doctor.storage)
    yield from [doctor.generator] if settings.hosted_model else [doctor.device, doctor.model]
    if doctor.model_info:
        yield doctor.images
    yield doctor.callback
    if settings.webhook_host:
        yield doctor.webhooks
    if settings.rabbitmq_url or settings.rabbitmq_host:
        yield doctor.rabbitmq
    if publisher.is_enabled(settings):
        yield doctor.metrics
    if settings.signature_font or settings.artist_name:
        yield doctor.signature
    if settings.c2pa_certificate or settings.c2pa_key or settings.c2pa_timestamp_url:
        yield doctor.manifest
    if settings.lora_source:
        yield doctor.loras
    if settings.evaluator != "none":
        yield doctor.evaluator
    if _unused_keys(settings):
        yield doctor.keys


def _check_address(host: str, port: int | None) -> None:
    try:
        run_with_timeout(
            _DNS_TIMEOUT, lambda: socket.getaddrinfo(host.strip("[]"), port or 443, type=socket.SOCK_STREAM)
        )
    except (OSError, TimeoutError):
        raise RunFailed(f"{host} has no address: the name is unknown; check --webhook-host") from None


def _run_check(check: Callable[[], str], settings: Settings) -> _Result:
    """Run a check, print its line, and return its result, without secrets."""
    from text2img.telemetry.logs import Mask

    mask = Mask(settings.secrets)
    try:
        result = _Result(name=check.__name__, ok=True, status=0, message=mask(check()))
    except Text2ImgError as exc:
        result = _Result(name=check.__name__, ok=False, status=exc.exit_status, message=mask(str(exc)))
    print_lines(f"{result['name']:<9} {'ok    ' if result['ok'] else 'FAILED'}  {result['message']}")
    return result
