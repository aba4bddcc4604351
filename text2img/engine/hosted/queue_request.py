"""One request's way through fal's queue: submitted, waited for, fetched; cancelled where it is given up.

The protocol is the one that fal documents for https://queue.fal.run: POST MODEL, then GET
APP/requests/ID/status and APP/requests/ID; PUT APP/requests/ID/cancel. Knows no other request.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
import time
from typing import TYPE_CHECKING, Any, Final, Literal

from text2img.concurrency.timeouts import exponential_backoff, parse_retry_after
from text2img.engine import GeneratedImage, hosted
from text2img.engine.hosted import http
from text2img.engine.hosted.http import HttpClient, RequestFailed, TooLarge
from text2img.errors import DeviceFailed, ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from text2img.engine.hosted import HostedOptions
    from text2img.engine.hosted.http import Answer
    from text2img.prompts import Request

    Step = Literal["submit", "status", "result", "picture"]

log = logging.getLogger(__name__)

HOSTED_SCHEDULER: Final = "hosted"
"""The scheduler's name in what is recorded: the service does not tell it."""
_LOOKS: Final = (0.25, 2.0)  # seconds between looks at a request: at first, and at the most
_LONGEST_WAIT: Final = 20.0  # seconds between two tries of our own accord
_LONGEST_ASKED: Final = 3600.0
_CANCELLING: Final = 2.0  # seconds
_ID = re.compile(r"[\w-]{1,100}", re.ASCII)


class ServiceUnavailable(DeviceFailed):
    """The service could not be asked for as long as the patience lasts; ``submitted``: it had the request."""

    def __init__(self, message: str, *, submitted: bool) -> None:
        super().__init__(message)
        self.submitted = submitted


class RequestCancelled(Exception):  # noqa: N818 - it says what happened
    """The run does not want the picture any more."""


class QueueRequest:
    """Fetches one picture, in one thread. ``gone``, once set, ends it at its next wait.

    ``wait(gone, seconds)`` says whether ``gone`` was set within so many seconds of ``clock``.
    """

    def __init__(
        self,
        options: HostedOptions,
        request: Request,
        gone: threading.Event,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self._options, self._request, self._gone = options, request, gone
        self._clock, self._wait = clock, wait
        self._wire = HttpClient(options.timeout)
        self._place: str | None = None

    def run(self) -> GeneratedImage:
        """The picture. Raises PromptFailed, ModelFailed, Away, and Abandoned where ``gone`` was set.

        A request that comes to no end here is cancelled at the service, where that still takes it back.
        """
        try:
            self._submit()
            self._wait_for_it()
            return self._fetch()
        except (RequestCancelled, PromptFailed, DeviceFailed):
            self._cancel()
            raise

    def _submit(self) -> None:
        options = self._options
        answer = self._ask("submit", f"{options.queue}/{options.model}", self._arguments())
        name = hosted.content(answer).get("request_id")
        if not isinstance(name, str) or not _ID.fullmatch(name):
            raise hosted.malformed("no request_id")
        # Not the addresses that the answer names: the key goes only where the operator sends it.
        self._place = f"{options.queue}/{options.app}/requests/{name}"

    def _arguments(self) -> dict[str, object]:
        """The model's input, by the names that fal's own models of text to image share."""
        wanted = self._request.parameters
        arguments: dict[str, object] = {
            "prompt": self._request.text,
            "seed": wanted.seed,
            "num_inference_steps": wanted.num_inference_steps,
            "guidance_scale": wanted.guidance_scale,
            "image_size": {"width": wanted.width, "height": wanted.height},
            "num_images": 1,
            "output_format": "png",
            "enable_safety_checker": self._options.safety_checker,
        }
        if wanted.negative_prompt:
            arguments["negative_prompt"] = wanted.negative_prompt
        return arguments

    def _wait_for_it(self) -> None:
        """Until the request is completed; PromptFailed where it stays as it is for too long, or is gone."""
        pause, seen, since = _LOOKS[0], "", self._clock()
        while True:
            status = hosted.content(self._ask("status", f"{self._place}/status"))
            state = hosted.plain(str(status.get("status")), 40)
            if state == "COMPLETED":
                return
            if state not in {"IN_QUEUE", "IN_PROGRESS"}:
                raise _failed(f"fal says that the request is {state}")
            news = f"{state} {status.get('queue_position')}"
            if news != seen:
                seen, since = news, self._clock()
            elif self._clock() - since > self._options.stall_timeout:
                raise _failed(f"fal has kept the request {state} for {self._options.stall_timeout:g} s")
            self._pause(pause)
            pause = min(pause * 1.5, _LOOKS[1])

    def _fetch(self) -> GeneratedImage:
        answer = self._ask("result", str(self._place))
        result = hosted.content(answer)
        self._check_safety(result)
        pixels = http.decode(self._bytes(_address(result)))
        if "has_nsfw_concepts" not in result and self._options.safety_checker and not pixels.any():
            raise PromptFailed(ErrorCode.SAFETY, "the picture is all black, as a safety checker leaves it")
        units = hosted.billed(answer)
        provider_metadata = {"request_id": str(self._place).rpartition("/")[2]}
        return GeneratedImage(
            pixels=pixels,
            scheduler=HOSTED_SCHEDULER,
            seed=self._other_seed(result),
            provider_metadata=provider_metadata
            if units is None
            else {**provider_metadata, "billed_units": units},
        )

    def _check_safety(self, result: dict[str, Any]) -> None:
        flags = result.get("has_nsfw_concepts")
        if flags is True or (isinstance(flags, list) and any(flag is True for flag in flags)):
            raise PromptFailed(ErrorCode.SAFETY, "fal's safety checker flagged the picture")

    def _bytes(self, address: str) -> bytes:
        data = http.inside(address)
        if data is not None:
            return data
        http.check_address(address, self._options.url)
        return self._ask("picture", address).body

    def _other_seed(self, result: dict[str, Any]) -> int | None:
        """The seed that was used, where it is another than the one asked for."""
        seed = result.get("seed")
        known = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63
        return seed if known and seed != self._request.parameters.seed else None

    def _ask(self, step: Step, url: str, document: object = None) -> Answer:
        """The 2xx answer, once there is one: what may pass is waited out, as long as the patience lasts."""
        latest = self._clock() + self._options.patience
        key = None if step == "picture" else self._options.key
        for tries in itertools.count(1):
            self._pause(0)
            try:
                answer = self._wire.ask(
                    "POST" if step == "submit" else "GET", url, key=key, document=document
                )
                if not hosted.passes(answer, final=step == "result"):
                    break
                reason = f"fal answers {answer.status}"
                put_off = parse_retry_after(answer.headers.get("retry-after"), _LONGEST_ASKED)
            except TooLarge:
                raise hosted.malformed("it is too large") from None
            except RequestFailed as exc:
                reason, put_off = str(exc), 0.0
            self._wait_again(max(exponential_backoff(tries, _LONGEST_WAIT), put_off), latest, reason)
        return self._settled(step, answer)

    def _wait_again(self, wait: float, latest: float, reason: str) -> None:
        """Wait before the next try, unless that would come too late."""
        if self._clock() + wait > latest:
            patience = f"--generator-patience ({self._options.patience:g} s)"
            message = f"{reason}, and {patience} allows no further try; run it again later"
            raise ServiceUnavailable(message, submitted=self._place is not None)
        log.debug("asking fal again in %.1f s: %s", wait, reason)
        self._pause(wait)

    def _settled(self, step: Step, answer: Answer) -> Answer:
        if 200 <= answer.status < 300:
            return answer
        if step == "picture":
            raise _failed(f"the picture could not be fetched ({answer.status})")
        if step == "status" and answer.status == 404:
            raise _failed("fal does not know the request any more")
        raise hosted.refusal(answer, self._options.model, self._options.key)

    def _pause(self, seconds: float) -> None:
        if self._wait(self._gone, seconds):
            raise RequestCancelled

    def _cancel(self) -> None:
        """Take the request back, if the service still can; whatever comes of it, this is the end."""
        if self._place is None:
            return
        try:
            HttpClient(_CANCELLING).ask("PUT", f"{self._place}/cancel", key=self._options.key)
        except (RequestFailed, TooLarge) as exc:
            log.debug("a request could not be cancelled: %s", exc)


def _address(result: dict[str, Any]) -> str:
    """Where the picture is: the first of ``images``, or ``image`` with models that make but one."""
    images = result.get("images")
    first = images[0] if isinstance(images, list) and images else result.get("image")
    address = first.get("url") if isinstance(first, dict) else None
    if not isinstance(address, str):
        raise hosted.malformed("no picture")
    return address


def _failed(message: str) -> PromptFailed:
    return PromptFailed(ErrorCode.GENERATION_FAILED, message)
