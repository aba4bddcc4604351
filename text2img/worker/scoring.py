"""Scores of a run's images: an unavailable evaluator is tried for a while, then the run ends.

Images that wait for a score are stored already. Their prompts stay pending, and a later run scores the stored
images in place of generating them again.
"""

from __future__ import annotations

import io
import logging
import threading
import time
from typing import TYPE_CHECKING, Final

from text2img.concurrency.timeouts import exponential_backoff, run_with_timeout
from text2img.errors import EvaluationFailed, EvaluatorFailed, ObjectUnreadable
from text2img.prompts.quoting import json_value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from text2img.concurrency.signals import Stop
    from text2img.engine import ModelInfo
    from text2img.evaluation import Evaluation, Evaluator
    from text2img.prompts import Request, StoredImage

log = logging.getLogger(__name__)

_TIMEOUT: Final = 300.0
"""Seconds for the score of one image; a run that is stopped does not wait for a score."""
_MAX_BACKOFF: Final = 10.0  # seconds between two attempts


class Scorer:
    """Scores images, and retries while the evaluator is unavailable; used by several threads at once.

    ``timeout``: the seconds after which an evaluator counts as lost, from the first failure without a success
    since. From then on every call fails at once. ``clock`` counts the seconds.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        timeout: float,
        stop: Stop,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._evaluator, self._timeout, self._stop, self._clock = evaluator, timeout, stop, clock
        self._lock = threading.Lock()
        self._failing_since: float | None = None
        self._lost: EvaluatorFailed | None = None

    def score(self, pixels: NDArray[np.uint8], text: str) -> Evaluation:
        """Return the evaluation of an image.

        Raises EvaluationFailed for this image's own failure, EvaluatorFailed when the evaluator rejects every
        request or has been unavailable for the timeout, and TimeoutError when the run is stopped first.
        """
        attempts = 0
        while True:
            if self._lost is not None:
                raise EvaluatorFailed(str(self._lost))
            attempts += 1
            try:
                found = run_with_timeout(
                    _TIMEOUT, lambda: self._evaluator.evaluate(pixels, text), cancel=self._stop.event
                )
            except EvaluatorFailed as exc:
                self._lost = exc
                raise
            except EvaluationFailed as exc:
                if not exc.retryable:
                    raise
                self._wait(exc, exponential_backoff(attempts, _MAX_BACKOFF))
            else:
                with self._lock:
                    self._failing_since = None
                return found

    def _wait(self, error: EvaluationFailed, delay: float) -> None:
        """Wait before the next attempt; raise EvaluatorFailed if the evaluator has been failing too long."""
        with self._lock:
            now = self._clock()
            if self._failing_since is None:
                self._failing_since = now
                log.warning("%s; retrying for %g s", error, self._timeout)
            left = self._failing_since + self._timeout - now
        if left <= 0:
            message = f"{error}; it was tried for --evaluator-timeout {self._timeout:g} s (EVALUATOR_TIMEOUT)"
            self._lost = EvaluatorFailed(message)
            raise self._lost from error
        if self._stop.event.wait(min(delay, left)):
            self._lost = EvaluatorFailed("the run was stopped before the evaluator answered")
            raise self._lost from error


def stored_image_of(request: Request, model: ModelInfo) -> StoredImage | None:
    """Return the stored image of the request that only waits for its score; None if it must be generated.

    It must have been made from the same text by the same model with the same parameters.
    """
    scheduler = request.parameters.scheduler or model.scheduler
    wanted = {**request.parameters.recorded, "scheduler": scheduler, "model": model.name}
    for image in request.prompt.unscored:
        same = (image.number, image.iteration, image.text) == (
            request.number,
            request.iteration,
            request.text,
        )
        if same and _agrees(image.used, wanted):
            return image
    return None


def _agrees(used: Mapping[str, object], wanted: Mapping[str, object]) -> bool:
    return all(json_value(used.get(name)) == json_value(value) for name, value in wanted.items())


def decode(file: bytes) -> NDArray[np.uint8]:
    """Return an image's pixels: uint8, (height, width, 3), RGB. Raises ObjectUnreadable."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file), formats=["PNG", "JPEG", "WEBP"]) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as exc:
        raise ObjectUnreadable("the stored file is not an image") from exc
