"""The engine for a model hosted by fal: it sends all requests of a batch at once, each in its own thread."""

from __future__ import annotations

import logging
import queue
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from text2img.engine import GeneratedImage, ModelInfo, hosted
from text2img.engine.devices import peak_memory
from text2img.engine.hosted import limits
from text2img.engine.hosted.queue_request import (
    HOSTED_SCHEDULER,
    HttpClient,
    QueueRequest,
    RequestFailed,
    ServiceUnavailable,
    TooLarge,
)
from text2img.engine.inspection import check_fits
from text2img.errors import ErrorCode, ModelFailed, PromptFailed, RunFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from text2img.engine.hosted import HostedOptions
    from text2img.engine.hosted.queue_request import Answer
    from text2img.prompts import Request

log = logging.getLogger(__name__)

_POLL_INTERVAL: Final = 0.2  # maximum seconds between two calls of on_step
_CANCEL_TIMEOUT: Final = 2.5  # seconds for cancelling requests; a run has eight for its whole shutdown


class HostedEngine:
    """An implementation of ``text2img.engine.Engine``; see there for the contract.

    A request that may succeed later fails with ``generation_failed``; the run fails only for errors that
    would affect every request. The service may choose another size or seed than requested; the returned image
    then states it. ``clock`` and ``wait`` are passed to QueueRequest.
    """

    def __init__(
        self,
        options: HostedOptions,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self._options = options
        self._clock, self._wait = clock, wait
        self._limits = limits(options.model)
        self._seconds = 0.0

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds spent so far, by stage; waiting for images is the only one."""
        return {"denoise": self._seconds}

    def inspect(self) -> ModelInfo:
        """Return the model's properties, without any request; a missing model fails at the first image."""
        return ModelInfo(
            name=f"fal:{self._options.model}",
            revision=None,
            family="hosted",
            width=1024,
            height=1024,
            multiple=8,
            scheduler=HOSTED_SCHEDULER,
            schedulers=(),
            max_steps={HOSTED_SCHEDULER: self._limits.max_steps},
            requested=self._limits.requested,
        )

    def load(self) -> None:
        """Do nothing: the weights are at the service."""

    def prepare(self, request: Request) -> Request:
        """Return the request unchanged; raise PromptFailed for what a hosted model cannot do. See Engine."""
        check_fits(self.inspect(), request.parameters)
        if request.parameters.loras:
            raise PromptFailed(ErrorCode.LORA_FAILED, "a hosted model takes no LoRAs; leave lora out")
        return request

    def warm_up(self, batch: Sequence[Request], remaining: int) -> None:
        """Do nothing: the service optimizes its model itself."""

    def generate(
        self, batch: Sequence[Request], on_step: Callable[[int, int], None]
    ) -> list[GeneratedImage | PromptFailed]:
        """Return an image or a failure for each request; see Engine.

        ``on_step`` receives the completed share of the batch, as steps, and is also called in between. An
        exception from it ends all requests: those at the service are cancelled, for at most 2.5 s.
        """
        if not batch:
            return []
        started, cancelled = time.monotonic(), threading.Event()
        steps = batch[0].parameters.num_inference_steps
        requests = [
            QueueRequest(self._options, request, cancelled, clock=self._clock, wait=self._wait)
            for request in batch
        ]
        try:
            results = _run_all(
                [request.run for request in requests],
                lambda done: on_step(done * steps // len(batch), steps),
                cancelled,
            )
        finally:
            self._seconds += time.monotonic() - started
        images = _resolve_failures(results)
        for request, image in zip(batch, images, strict=True):
            _warn_if_different(request, image)
        return images

    def peak_memory(self) -> int:
        """Return the maximum number of bytes that this process has held so far."""
        return peak_memory()

    def close(self) -> None:
        """Do nothing: this engine holds no resources. See Engine."""

    def check_access(self) -> str:
        """Check the key, and return the model's price as text, for ``doctor``; makes no image.

        Raises ModelFailed if the key is refused, the model unknown or the service unavailable.
        """
        options = self._options
        url = f"{options.platform}/v1/models/pricing?endpoint_id={options.model}"
        try:
            answer = HttpClient(10).request("GET", url, key=options.key)
        except (RequestFailed, TooLarge) as exc:
            raise ModelFailed(f"fal's prices cannot be queried: {exc}") from exc
        return f"{options.model}: {self._describe_access(answer)}"

    def _describe_access(self, answer: Answer) -> str:
        if 200 <= answer.status < 300:
            return f"the key is accepted; {hosted.describe_price(answer)}"
        failure = hosted.rejection(answer, self._options.model, self._options.key)
        if isinstance(failure, ModelFailed):
            raise failure
        return f"a key is set, but fal did not confirm it ({answer.status})"


def _run_all(
    requests: Sequence[Callable[[], GeneratedImage]],
    on_progress: Callable[[int], None],
    cancelled: threading.Event,
) -> list[GeneratedImage | Exception]:
    """Run each request in its own thread, and return an image or an exception for each.

    ``on_progress(done)`` is called in the caller's thread. The threads are daemons: a thread that hangs must
    not keep the process from exiting.
    """
    results: dict[int, GeneratedImage | Exception] = {}
    finished: queue.SimpleQueue[tuple[int, GeneratedImage | Exception]] = queue.SimpleQueue()

    def run(index: int) -> None:
        try:
            finished.put((index, requests[index]()))
        except Exception as exc:  # noqa: BLE001 - the caller's thread handles it
            finished.put((index, exc))

    threads = [
        threading.Thread(target=run, args=[index], name="fal-request", daemon=True)
        for index in range(len(requests))
    ]
    for thread in threads:
        thread.start()
    try:
        while len(results) < len(requests):
            with suppress(queue.Empty):
                index, result = finished.get(timeout=_POLL_INTERVAL)
                results[index] = result
            on_progress(len(results))
    except BaseException:
        cancelled.set()
        deadline = time.monotonic() + _CANCEL_TIMEOUT
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        raise
    return [results[index] for index in range(len(requests))]


def _resolve_failures(results: Sequence[GeneratedImage | Exception]) -> list[GeneratedImage | PromptFailed]:
    """Return the results; raise an error that fails the run, unless an image of the batch must be kept.

    If any image succeeded, keep it and fail only the other prompts; if the outage continues, the next batch
    fails the run. A prompt therefore loses at most one attempt. A single request that the service accepted
    and then did not complete fails alone too: it would otherwise end every run.
    """
    any_image = any(isinstance(result, GeneratedImage) for result in results)
    resolved: list[GeneratedImage | PromptFailed] = []
    for result in results:
        alone = isinstance(result, ServiceUnavailable) and result.submitted and len(results) == 1
        if isinstance(result, GeneratedImage | PromptFailed):
            resolved.append(result)
        elif isinstance(result, RunFailed) and (any_image or alone):
            resolved.append(PromptFailed(ErrorCode.GENERATION_FAILED, str(result)))
        else:
            raise result
    return resolved


def _warn_if_different(request: Request, image: GeneratedImage | PromptFailed) -> None:
    """Warn if an image has another size or seed than requested."""
    if not isinstance(image, GeneratedImage):
        return
    parameters, prompt_id = request.parameters, request.prompt.id
    height, width = image.pixels.shape[:2]
    if (width, height) != (parameters.width, parameters.height):
        log.warning(
            "%s is %d×%d, not %d×%d as requested",
            prompt_id,
            width,
            height,
            parameters.width,
            parameters.height,
        )
    if image.seed is not None:
        log.warning(
            "%s was generated with seed %d, not %d as requested", prompt_id, image.seed, parameters.seed
        )
