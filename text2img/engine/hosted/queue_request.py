"""One request to a hosted queue: HTTP bounded in time and size, the protocol, the images in the answers."""

from __future__ import annotations

import base64
import binascii
import io
import itertools
import logging
import re
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import urlsplit

from text2img import __version__
from text2img.concurrency.timeouts import exponential_backoff, parse_retry_after, run_with_timeout
from text2img.engine import GeneratedImage, hosted
from text2img.engine.hosted import malformed_answer
from text2img.errors import DeviceFailed, ErrorCode, PromptFailed
from text2img.images import holds_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    import requests
    from numpy.typing import NDArray
    from PIL import Image

    from text2img.engine.hosted import HostedOptions
    from text2img.prompts import Request


MAX_BYTES: Final = 64 * 2**20
"""Maximum size of an answer: an image of 16 million pixels fits, even inside the JSON."""


class RequestFailed(Exception):  # noqa: N818 - named after the event
    """There is no answer, or no complete one. The message gives the reason and contains no secret."""


class TooLarge(Exception):  # noqa: N818 - named after the event
    """The answer is larger than MAX_BYTES."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer; the names of ``headers`` are case-insensitive."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpClient:
    """An HTTP client that keeps its connection between requests; for one thread at a time.

    ``timeout`` is in seconds, for one exchange, from the name lookup to the last byte. Proxies and
    certificates come from the environment, credentials never do. Redirects are not followed: they could send
    the key elsewhere.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._session: requests.Session | None = None

    def request(self, method: str, url: str, *, key: str | None = None, document: object = None) -> Answer:
        """Send a request and return the answer, whatever its status. Raises RequestFailed and TooLarge."""
        import requests

        session = self._session = self._session or self._open()
        try:
            return run_with_timeout(
                self._timeout + 1, lambda: self._exchange(session, method, url, key, document)
            )
        except (requests.RequestException, OSError) as exc:  # TimeoutError is an OSError
            self._session = None  # the abandoned thread may still use it
            # Not from exc: a stack trace would show the URL, which may be signed.
            raise RequestFailed(self._describe_error(url, exc)) from None

    def _open(self) -> requests.Session:
        """Return a session whose exchanges end in time, by themselves."""
        import requests

        from text2img.concurrency.http_limits import LimitedAdapter, TotalTime

        session = requests.Session()
        for scheme in ("http://", "https://"):
            session.mount(scheme, LimitedAdapter(TotalTime(self._timeout)))
        return session

    def _exchange(
        self, session: requests.Session, method: str, url: str, key: str | None, document: object
    ) -> Answer:
        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            """Set the key, if any. Passing an auth function also keeps requests from reading netrc."""
            if key is not None:
                request.headers["Authorization"] = f"Key {key}"
            return request

        with session.request(
            method,
            url,
            json=document,
            headers={"User-Agent": f"text2img/{__version__}", "Accept-Encoding": "identity"},
            auth=authorize,
            timeout=self._timeout,
            allow_redirects=False,
            stream=True,
        ) as response:
            return Answer(response.status_code, response.headers, _read(response))

    def _describe_error(self, url: str, exc: Exception) -> str:
        """Describe the error by its kind; the libraries' own messages contain the whole URL."""
        import requests

        host = urlsplit(url).hostname
        if isinstance(exc, (TimeoutError, requests.Timeout)):
            return f"{host} did not answer within {self._timeout:g} s"
        cause: BaseException | None = exc
        while cause is not None:
            if isinstance(cause, TimeoutError):
                return f"{host} did not answer within {self._timeout:g} s"
            if isinstance(cause, socket.gaierror):
                return f"{host} has no address: its name cannot be resolved"
            if isinstance(cause, ConnectionRefusedError):
                return f"{host} refuses connections"
            cause = cause.__cause__ or cause.__context__
        return f"{host} cannot be reached ({type(exc).__name__})"


def _read(response: requests.Response) -> bytes:
    """Return the body; raise TooLarge beyond MAX_BYTES, which count after decompression."""
    body = bytearray()
    for chunk in response.iter_content(2**16):
        body += chunk
        if len(body) > MAX_BYTES:
            raise TooLarge
    return bytes(body)


_HOSTS: Final = ("fal.media", "fal.ai", "fal.run")
"""The hosts where fal stores its models' output: these and their subdomains."""
_BUCKET_PREFIX: Final = ("storage.googleapis.com", "/falserverless/")
_BYTES_PER_PIXEL: Final = 8
"""Bytes of memory for each of the largest image's pixels, that decoding an image may take."""
_DECODER_BYTES: Final = {"PNG": 8, "JPEG": 8, "WEBP": 17}
"""What decoding takes for each pixel: Pillow's image (4), the result (3); WebP's decoder keeps two frames."""
_PROGRESSIVE_BYTES: Final = 4
"""What more a progressive JPEG takes, whose coefficients are all kept until the last scan."""
_STRIP_PIXELS: Final = 2**18
_DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,", re.IGNORECASE)


def decode_data_url(url: str) -> bytes | None:
    """Return the bytes of a ``data:`` URL with an image; None for any other URL.

    Raises PromptFailed if they are not valid base64.
    """
    prefix = _DATA_URL.match(url)
    if prefix is None:
        return None
    try:
        return base64.b64decode(url[prefix.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise malformed_answer("an image that is not valid base64") from None


def check_address(url: str, origin: str | None) -> None:
    """Raise PromptFailed unless the URL is https:// at one of fal's own hosts.

    ``origin`` is the URL of the service that the operator uses instead of fal, which is then allowed too.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise malformed_answer("an address that cannot be parsed") from None
    if re.search(r"[\x00-\x20\x7f\\@]", url):
        raise malformed_answer("an address that cannot be parsed")
    if origin is not None and _origin(url) == _origin(origin):
        return
    is_fal = any(host == name or host.endswith(f".{name}") for name in _HOSTS)
    is_fal = is_fal or (host == _BUCKET_PREFIX[0] and parts.path.startswith(_BUCKET_PREFIX[1]))
    if parts.scheme != "https" or port not in {None, 443} or not is_fal:
        raise malformed_answer("an image at an address that is not fal's")


def decode(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """Return the pixels: uint8, (height, width, 3), RGB.

    Raises PromptFailed for data that is not an image in PNG, JPEG or WebP, or that would take more memory
    than the largest image, of ``max_pixels``, may: its header shows that.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=tuple(_DECODER_BYTES)) as image:
            if image.width * image.height * _bytes_per_pixel(image) <= max_pixels * _BYTES_PER_PIXEL:
                return _rgb(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pass
    except Exception:  # noqa: BLE001 - whatever a hostile file does to its decoder, only its prompt fails
        raise malformed_answer("a file that is not an image") from None
    raise malformed_answer("an image that is too large")


def _bytes_per_pixel(image: Image.Image) -> int:
    """Return the bytes that decoding the image takes, for each of its pixels."""
    is_progressive = "progressive" in image.info or "progression" in image.info
    return _DECODER_BYTES[str(image.format)] + (_PROGRESSIVE_BYTES if is_progressive else 0)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Return the image's pixels, converted in strips: never is the whole image there three times."""
    import numpy as np

    image.load()
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, width, bottom)).convert("RGB"))
    return pixels


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


if TYPE_CHECKING:
    Step = Literal["submit", "status", "result", "image"]

log = logging.getLogger(__name__)

HOSTED_SCHEDULER: Final = "hosted"
"""The scheduler's name in results: the service does not report it."""
_POLL_INTERVALS: Final = (0.25, 2.0)  # seconds between status queries: the first and the maximum
_MAX_BACKOFF: Final = 20.0  # seconds between two attempts when the service asks for no delay
_MAX_RETRY_AFTER: Final = 3600.0  # seconds
_CANCEL_TIMEOUT: Final = 2.0  # seconds
_ID = re.compile(r"[\w-]{1,100}", re.ASCII)


class ServiceUnavailable(DeviceFailed):
    """The service stayed unavailable for the retry timeout; ``submitted``: it had accepted the request."""

    def __init__(self, message: str, *, submitted: bool) -> None:
        super().__init__(message)
        self.submitted = submitted


class RequestCancelled(Exception):  # noqa: N818 - named after the event
    """The run no longer needs the image."""


class QueueRequest:
    """One image request, for one thread. Setting ``cancelled`` ends it at its next wait.

    ``wait(cancelled, seconds)`` returns True if ``cancelled`` is set within that many seconds of ``clock``.
    """

    def __init__(
        self,
        options: HostedOptions,
        request: Request,
        cancelled: threading.Event,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self._options, self._request, self._cancelled = options, request, cancelled
        self._clock, self._wait = clock, wait
        self._client = HttpClient(options.timeout)
        self._request_url: str | None = None

    def run(self) -> GeneratedImage:
        """Return the image; on failure, cancel the request at the service if that is still possible.

        Raises PromptFailed, ModelFailed, ServiceUnavailable, and RequestCancelled if ``cancelled`` is set.
        """
        try:
            self._submit()
            self._wait_until_completed()
            return self._fetch()
        except (RequestCancelled, PromptFailed, DeviceFailed):
            self._cancel()
            raise

    def _submit(self) -> None:
        options = self._options
        answer = self._request_with_retries("submit", f"{options.queue}/{options.model}", self._model_input())
        request_id = hosted.json_content(answer).get("request_id")
        if not isinstance(request_id, str) or not _ID.fullmatch(request_id):
            raise hosted.malformed_answer("no request_id")
        # Do not use the URLs in the answer: the key must go only to the operator's service.
        self._request_url = f"{options.queue}/{options.app}/requests/{request_id}"

    def _model_input(self) -> dict[str, object]:
        """Return the model's input, by the field names that fal's own text-to-image models share."""
        parameters = self._request.parameters
        model_input: dict[str, object] = {
            "prompt": self._request.text,
            "seed": parameters.seed,
            "num_inference_steps": parameters.num_inference_steps,
            "guidance_scale": parameters.guidance_scale,
            "image_size": {"width": parameters.width, "height": parameters.height},
            "num_images": 1,
            "output_format": "png",
            "enable_safety_checker": self._options.safety_checker,
        }
        if parameters.negative_prompt:
            model_input["negative_prompt"] = parameters.negative_prompt
        return model_input

    def _wait_until_completed(self) -> None:
        """Poll until the request is completed; raise PromptFailed if it stalls or is gone."""
        interval, last_progress, since = _POLL_INTERVALS[0], "", self._clock()
        while True:
            status = hosted.json_content(self._request_with_retries("status", f"{self._request_url}/status"))
            state = hosted.printable_line(str(status.get("status")), 40)
            if state == "COMPLETED":
                return
            if state not in {"IN_QUEUE", "IN_PROGRESS"}:
                raise _failed(f"fal reports that the request is {state}")
            progress = f"{state} {status.get('queue_position')}"
            if progress != last_progress:
                last_progress, since = progress, self._clock()
            elif self._clock() - since > self._options.stall_timeout:
                raise _failed(f"the request has been {state} at fal for {self._options.stall_timeout:g} s")
            self._pause(interval)
            interval = min(interval * 1.5, _POLL_INTERVALS[1])

    def _fetch(self) -> GeneratedImage:
        answer = self._request_with_retries("result", str(self._request_url))
        result = hosted.json_content(answer)
        self._check_safety(result)
        units, seed = hosted.billed_units(answer), self._other_seed(result)
        check_black = "has_nsfw_concepts" not in result and self._options.safety_checker
        data = self._image_bytes(_image_url(result))
        del answer, result  # they may hold the image themselves, encoded, which decoding needs no more
        pixels = decode(data, self._options.max_pixels)
        if check_black and not pixels.any():
            raise PromptFailed(ErrorCode.SAFETY, "the image is all black, as a safety checker leaves it")
        provider_metadata = {"request_id": str(self._request_url).rpartition("/")[2]}
        return GeneratedImage(
            pixels=pixels,
            scheduler=HOSTED_SCHEDULER,
            seed=seed,
            provider_metadata=provider_metadata
            if units is None
            else {**provider_metadata, "billed_units": units},
            delivered=data if holds_manifest(data) else None,
        )

    def _check_safety(self, result: dict[str, Any]) -> None:
        flags = result.get("has_nsfw_concepts")
        if flags is True or (isinstance(flags, list) and any(flag is True for flag in flags)):
            raise PromptFailed(ErrorCode.SAFETY, "fal's safety checker flagged the image")

    def _image_bytes(self, url: str) -> bytes:
        data = decode_data_url(url)
        if data is not None:
            return data
        check_address(url, self._options.url)
        return self._request_with_retries("image", url).body

    def _other_seed(self, result: dict[str, Any]) -> int | None:
        """Return the seed that was used if it differs from the requested one, else None."""
        seed = result.get("seed")
        is_valid = isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2**63
        return seed if is_valid and seed != self._request.parameters.seed else None

    def _request_with_retries(self, step: Step, url: str, document: object = None) -> Answer:
        """Return the 2xx answer, retrying transient failures until the retry timeout."""
        deadline = self._clock() + self._options.retry_timeout
        key = None if step == "image" else self._options.key
        for attempt in itertools.count(1):
            self._pause(0)
            try:
                answer = self._client.request(
                    "POST" if step == "submit" else "GET", url, key=key, document=document
                )
                if not hosted.is_transient(answer, final=step == "result"):
                    break
                reason = f"fal answers {answer.status}"
                retry_after = parse_retry_after(answer.headers.get("retry-after"), _MAX_RETRY_AFTER)
            except TooLarge:
                raise hosted.malformed_answer("it is too large") from None
            except RequestFailed as exc:
                reason, retry_after = str(exc), 0.0
            delay = max(exponential_backoff(attempt, _MAX_BACKOFF), retry_after)
            self._wait_before_retry(delay, deadline, reason)
        return self._check_status(step, answer)

    def _wait_before_retry(self, delay: float, deadline: float, reason: str) -> None:
        """Wait before the next attempt; raise ServiceUnavailable if it would be after the deadline."""
        if self._clock() + delay > deadline:
            limit = f"--generator-patience ({self._options.retry_timeout:g} s)"
            message = f"{reason}, and {limit} allows no further attempt; run it again later"
            raise ServiceUnavailable(message, submitted=self._request_url is not None)
        log.debug("retrying the request to fal in %.1f s: %s", delay, reason)
        self._pause(delay)

    def _check_status(self, step: Step, answer: Answer) -> Answer:
        if 200 <= answer.status < 300:
            return answer
        if step == "image":
            raise _failed(f"the image could not be fetched ({answer.status})")
        if step == "status" and answer.status == 404:
            raise _failed("fal no longer has the request")
        raise hosted.rejection(answer, self._options.model, self._options.key)

    def _pause(self, seconds: float) -> None:
        if self._wait(self._cancelled, seconds):
            raise RequestCancelled

    def _cancel(self) -> None:
        """Cancel the request at the service, if it was submitted; a failure to cancel is only logged."""
        if self._request_url is None:
            return
        try:
            HttpClient(_CANCEL_TIMEOUT).request("PUT", f"{self._request_url}/cancel", key=self._options.key)
        except (RequestFailed, TooLarge) as exc:
            log.debug("a request could not be cancelled: %s", exc)


def _image_url(result: dict[str, Any]) -> str:
    """Return the URL of the first of ``images``, or of ``image`` from models that make only one."""
    images = result.get("images")
    first = images[0] if isinstance(images, list) and images else result.get("image")
    url = first.get("url") if isinstance(first, dict) else None
    if not isinstance(url, str):
        raise hosted.malformed_answer("no image")
    return url


def _failed(message: str) -> PromptFailed:
    return PromptFailed(ErrorCode.GENERATION_FAILED, message)
