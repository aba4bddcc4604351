"""``doctor``: tries every dependency of a run, one line each, and changes nothing that stays."""

from __future__ import annotations

import socket
from contextlib import closing
from typing import TYPE_CHECKING

from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import ModelFailed, RunFailed, Text2ImgError
from text2img.telemetry import publisher
from text2img.worker import build, platform_task

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from text2img.engine import ModelInfo
    from text2img.prompts import ModelConfiguration
    from text2img.settings import Settings
    from text2img.telemetry.progress import Progress


_LOOK_UP = 5.0  # seconds for a name's address


class _Doctor:
    """The trials; each returns what it found or raises what is wrong."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._configuration: ModelConfiguration | None = None
        self.model_info: ModelInfo | None = None

    def database(self) -> str:
        """Connect, count, read the model configuration."""
        with closing(build.database(self._settings)) as database:
            waiting = database.pending(build.selection(self._settings))
            self._configuration = database.model_configuration(self._settings.model_config_id)
        return f"prompts waiting: {waiting}"

    def storage(self) -> str:
        """Write an object and delete it again."""
        build.storage(self._settings).check_writable()
        return f"{self._settings.output_url} can be written"

    def device(self) -> str:
        """Look for the device."""
        build.check_device(self._settings)
        return f"{self._settings.device} is there"

    def model(self) -> str:
        """Find the model and check what can be known without its weights' values."""
        model_info = self.model_info = build.engine(self._settings, self._configuration).inspect()
        return f"{model_info.name}, {model_info.width}×{model_info.height}, {model_info.scheduler}"

    def generator(self) -> str:
        """Ask the hosted generator for its price, which needs the key and costs nothing."""
        hosted = build.hosted(self._settings, self._configuration)
        price, self.model_info = hosted.check_access(), hosted.inspect()
        return price

    def callback(self) -> str:
        """Reach the receiver without telling it anything."""
        from text2img.webhooks.delivery import DeliveryStatus

        receiver = build.callback(self._settings)
        if receiver is None:
            return "none is configured"
        verdict = receiver.ping()
        if verdict.status is not DeliveryStatus.DELIVERED:
            raise RunFailed(verdict.detail)
        return verdict.detail

    def evaluator(self) -> str:
        """Look for what can be known of it before there is a picture."""
        evaluator = build.evaluator(self._settings)
        if evaluator is None:
            return "none is configured"
        evaluator.check()
        return evaluator.name

    def pictures(self) -> str:
        """Settle what every picture gets where its prompt asks for nothing else."""
        if self.model_info is None:
            raise ModelFailed("they cannot be settled without a model")
        wished = build.run_defaults(self._settings, self.model_info, self._configuration)
        wanted = build.validate_defaults(build.build(self._settings), self.model_info, wished)
        steps, guidance = wanted.num_inference_steps, wanted.guidance_scale
        return f"{wanted.width}×{wanted.height}, {steps} steps, guidance {guidance:g}"

    def loras(self) -> str:
        """Write to the folder that keeps them."""
        build.loras(self._settings).check_cache()
        return f"from {self._settings.lora_source}"

    def webhooks(self) -> str:
        """Look up the hosts that prompts' own webhooks may be on; nothing is sent to them."""
        hosts = build.webhook_hosts(self._settings)
        for host, port in hosts.exact_hosts:
            _look_up(host, port)
        return f"{hosts} may be told"

    def rabbitmq(self) -> str:
        """Reach the broker, and look at the queues."""
        broker = build.broker(self._settings)
        return "none is configured" if broker is None else broker.describe_queues()

    def metrics(self) -> str:
        """Look whether a run would publish its figures; nothing is written or pushed."""
        port = ["--metrics-port"] if self._settings.metrics_port else []
        return ", ".join(
            [*(place.name for place in publisher.check(self._settings, platform_task.instance())), *port]
        )

    def signature(self) -> str:
        """Read the font that signs, and look for what it takes to draw every name with it."""
        from text2img.images.signature import Signer

        font = Signer(self._settings.signature_font).font
        lacks = "" if font.shaping else "; without libfribidi no name right to left, joined or with marks"
        return f"{font.name} holds {font.size:,} characters{lacks}"


def main(settings: Settings, arguments: argparse.Namespace, progress: Progress) -> int:
    """Print a line for each trial; the exit status is that of the first that failed."""
    del arguments, progress
    statuses = [_try(trial, settings) for trial in _trials(_Doctor(settings), settings)]
    return next((status for status in statuses if status), 0)


def _trials(doctor: _Doctor, settings: Settings) -> Iterator[Callable[[], str]]:
    """One after another: what comes may depend on what was found before."""
    yield from (doctor.database, doctor.storage)
    yield from [doctor.generator] if settings.hosted_model else [doctor.device, doctor.model]
    if doctor.model_info:
        yield doctor.pictures
    yield doctor.callback
    if settings.webhook_host:
        yield doctor.webhooks
    if settings.rabbitmq_url or settings.rabbitmq_host:
        yield doctor.rabbitmq
    if publisher.asked(settings):
        yield doctor.metrics
    if settings.signature_font or settings.artist_name:
        yield doctor.signature
    if settings.lora_source:
        yield doctor.loras
    if settings.evaluator != "none":
        yield doctor.evaluator


def _look_up(host: str, port: int | None) -> None:
    try:
        run_with_timeout(
            _LOOK_UP, lambda: socket.getaddrinfo(host.strip("[]"), port or 443, type=socket.SOCK_STREAM)
        )
    except (OSError, TimeoutError):
        raise RunFailed(f"{host} has no address: the name is not known; check --webhook-host") from None


def _try(trial: Callable[[], str], settings: Settings) -> int:
    from text2img.telemetry.logs import Mask

    mask = Mask(settings.secrets)
    name = trial.__name__
    try:
        print(mask(f"{name:<9} ok      {trial()}"))
    except Text2ImgError as exc:
        print(mask(f"{name:<9} FAILED  {exc}"))
        return exc.exit_status
    return 0
