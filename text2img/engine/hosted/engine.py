"""The engine that has pictures drawn by a model at fal: all of a batch at once, each by its own errand."""

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
from text2img.engine.hosted.http import HttpClient, RequestFailed, TooLarge
from text2img.engine.hosted.queue_request import HOSTED_SCHEDULER, QueueRequest, ServiceUnavailable
from text2img.engine.inspection import check_fits
from text2img.errors import ErrorCode, ModelFailed, PromptFailed, RunFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from text2img.engine.hosted import HostedOptions
    from text2img.engine.hosted.http import Answer
    from text2img.prompts import Request

log = logging.getLogger(__name__)

_BEAT: Final = 0.2  # seconds between two beats at the most
_LEAVING: Final = 2.5  # seconds for requests to be cancelled; a run that is stopped has eight for all its end


class HostedEngine:
    """Implements ``text2img.engine.Engine``; its promises stand there.

    A request that may go better another time fails with ``generation_failed``; the run ends only where that
    would go on for all of them. What is drawn elsewhere may have another size, or another seed, than it was
    asked for: then the picture says so. ``clock`` and ``wait`` are those of an errand.
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
        """Seconds spent so far, by stage: all of them are spent waiting for pictures."""
        return {"denoise": self._seconds}

    def inspect(self) -> ModelInfo:
        """What is known of the model. Asks nobody: whether it is there, its first picture shows."""
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
        """Nothing: the weights are elsewhere."""

    def prepare(self, request: Request) -> Request:
        """The request as it is, or PromptFailed; see Engine."""
        check_fits(self.inspect(), request.parameters)
        if request.parameters.loras:
            raise PromptFailed(ErrorCode.LORA_FAILED, "a hosted model takes no LoRAs; leave lora out")
        return request

    def warm_up(self, batch: Sequence[Request], remaining: int) -> None:
        """Nothing: what makes the model faster is its host's business."""

    def generate(
        self, batch: Sequence[Request], on_step: Callable[[int, int], None]
    ) -> list[GeneratedImage | PromptFailed]:
        """A picture or the reason for none, for each request; see Engine.

        ``on_step`` tells the share of the batch that is done, as steps, and is called between as well. What
        it raises ends all requests: those that wait at the service are cancelled, as far as 2.5 s suffice.
        """
        if not batch:
            return []
        begun, gone, steps = time.monotonic(), threading.Event(), batch[0].parameters.num_inference_steps
        errands = [
            QueueRequest(self._options, request, gone, clock=self._clock, wait=self._wait)
            for request in batch
        ]
        try:
            ends = _together(
                [errand.run for errand in errands],
                lambda done: on_step(done * steps // len(batch), steps),
                gone,
            )
        finally:
            self._seconds += time.monotonic() - begun
        made = _settle(ends)
        for request, end in zip(batch, made, strict=True):
            _tell(request, end)
        return made

    def peak_memory(self) -> int:
        """The most bytes that this process held so far."""
        return peak_memory()

    def close(self) -> None:
        """Nothing is held here; see Engine."""

    def look_up(self) -> str:
        """What the service says of the key and the model's price, for ``doctor``; makes no picture.

        Raises ModelFailed for a key that is refused, a model that is not known, a service that is away.
        """
        options = self._options
        url = f"{options.platform}/v1/models/pricing?endpoint_id={options.model}"
        try:
            answer = HttpClient(10).ask("GET", url, key=options.key)
        except (RequestFailed, TooLarge) as exc:
            raise ModelFailed(f"fal's prices cannot be asked for: {exc}") from exc
        return f"{options.model}: {self._looked_up(answer)}"

    def _looked_up(self, answer: Answer) -> str:
        if 200 <= answer.status < 300:
            return f"the key is accepted; {hosted.price(answer)}"
        verdict = hosted.refusal(answer, self._options.model, self._options.key)
        if isinstance(verdict, ModelFailed):
            raise verdict
        return f"there is a key; whether it is accepted, fal did not say ({answer.status})"


def _together(
    errands: Sequence[Callable[[], GeneratedImage]], beat: Callable[[int], None], gone: threading.Event
) -> list[GeneratedImage | Exception]:
    """What becomes of each errand, each in a thread of its own; ``beat(done)`` is called in this one.

    The threads are daemons: what hangs in one must not keep a process that is asked to end.
    """
    ends: dict[int, GeneratedImage | Exception] = {}
    done: queue.SimpleQueue[tuple[int, GeneratedImage | Exception]] = queue.SimpleQueue()

    def go(number: int) -> None:
        try:
            done.put((number, errands[number]()))
        except Exception as exc:  # noqa: BLE001 - whoever waits decides what it means
            done.put((number, exc))

    threads = [threading.Thread(target=go, args=[n], name="errand", daemon=True) for n in range(len(errands))]
    for thread in threads:
        thread.start()
    try:
        while len(ends) < len(errands):
            with suppress(queue.Empty):
                number, end = done.get(timeout=_BEAT)
                ends[number] = end
            beat(len(ends))
    except BaseException:
        gone.set()
        latest = time.monotonic() + _LEAVING
        for thread in threads:
            thread.join(max(0.0, latest - time.monotonic()))
        raise
    return [ends[number] for number in range(len(errands))]


def _settle(ends: Sequence[GeneratedImage | Exception]) -> list[GeneratedImage | PromptFailed]:
    """The results. What would fail the run fails its prompt where another's picture is there to be kept.

    The next batch has none, should it go on; so that no more than one try of these prompts is lost. Neither
    does a single request that the service took, and then would not speak of, fail the run: none would follow.
    """
    made = any(isinstance(end, GeneratedImage) for end in ends)
    settled: list[GeneratedImage | PromptFailed] = []
    for end in ends:
        alone = isinstance(end, ServiceUnavailable) and end.submitted and len(ends) == 1
        if isinstance(end, GeneratedImage | PromptFailed):
            settled.append(end)
        elif isinstance(end, RunFailed) and (made or alone):
            settled.append(PromptFailed(ErrorCode.GENERATION_FAILED, str(end)))
        else:
            raise end
    return settled


def _tell(request: Request, end: GeneratedImage | PromptFailed) -> None:
    """Warn of a picture that is not quite what was asked for."""
    if not isinstance(end, GeneratedImage):
        return
    wanted, name = request.parameters, request.prompt.id
    height, width = end.pixels.shape[:2]
    if (width, height) != (wanted.width, wanted.height):
        log.warning("%s is %d×%d, not %d×%d as asked", name, width, height, wanted.width, wanted.height)
    if end.seed is not None:
        log.warning("%s was drawn with seed %d, not %d as asked", name, end.seed, wanted.seed)
