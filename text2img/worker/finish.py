"""The end of the flow: encode → store → record → notify, for the images that the device has generated."""

from __future__ import annotations

import hashlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from text2img.errors import (
    ClaimLost,
    ErrorCode,
    EvaluationFailed,
    EvaluatorFailed,
    ObjectUnreadable,
    PromptFailed,
)
from text2img.images import Duplicate, parameters
from text2img.prompts import (
    AwaitsScore,
    Completed,
    Evaluation,
    Failed,
    NeedsRefinement,
    RetryLater,
    StoredImage,
    failure,
)
from text2img.prompts.refinement import awaiting_score, fall_back_to_best, first_failure
from text2img.storage import Existing
from text2img.worker import build
from text2img.worker.scoring import Scorer, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from text2img.engine import GeneratedImage, ModelInfo
    from text2img.images import File
    from text2img.prompts import Claim, Outcome, Prompt, Request
    from text2img.prompts.batching import ClaimBudget
    from text2img.prompts.refinement import Loop
    from text2img.worker.build import Dependencies, RunContext

    Images = Sequence[GeneratedImage | StoredImage | PromptFailed | None]

log = logging.getLogger(__name__)

_MAX_ENCODERS = 4
"""Images encoded at once. Uploads wait for the network, many threads help; encoding needs cores, and more
threads than cores would only slow down the thread that owns the device."""


class PostProcessor:
    """Finishes the batches of one run, several at a time: encode → store → record → notify.

    A pool of threads encodes, uploads and scores the images. Leaving the ``with`` block waits for the pool.
    """

    def __init__(
        self, deps: Dependencies, run: RunContext, model_info: ModelInfo, budget: ClaimBudget
    ) -> None:
        self._deps, self._run, self._model_info, self._budget = deps, run, model_info, budget
        self._pool = ThreadPoolExecutor(deps.upload_workers, "store")
        self._encoders = threading.BoundedSemaphore(_MAX_ENCODERS)
        self._groups = ImageGroups(deps.loop)
        self._sidecars = build.sidecars(deps, run)
        evaluator = deps.evaluator
        self._scorer = None if evaluator is None else Scorer(evaluator, deps.evaluator_timeout, run.stop)
        self._evaluator_failure: EvaluatorFailed | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def is_needed(self, request: Request) -> bool:
        """Return whether the image is needed: its claim is held, and no image of its prompt failed.

        The claim is held as far as this worker knows; the database is not queried.
        """
        claim = request.prompt.claim
        return self._run.leases.holds(claim) and not self._groups.has_failed(claim)

    def encode_and_store(
        self, emit: Callable[[list[Outcome]], None], generated: tuple[Sequence[Request], Images]
    ) -> None:
        """Encode and store the images of a batch; emit the outcomes of prompts that have all their images.

        Raises the first failure that is not one prompt's own (of the storage or the database, or Stopped),
        after the outcomes that are complete without that image have been emitted.
        """
        batch, images = generated
        futures = [self._pool.submit(self._finish_image, *each) for each in zip(batch, images, strict=True)]
        wait(futures)
        outcomes = [
            self._groups.add(request, future.result())
            for request, future in zip(batch, futures, strict=True)
            if not future.exception()
        ]
        emit([outcome for outcome in outcomes if outcome])
        for future in futures:
            future.result()
        if self._evaluator_failure is not None:
            raise self._evaluator_failure

    def record_and_notify(self, outcomes: Sequence[Outcome]) -> None:
        """Record outcomes, and notify of those that were recorded: the others had lost their claim."""
        outcomes = [_or_best(outcome) for outcome in outcomes] if self._deps.loop else outcomes
        self._write_sidecars(outcomes)
        recorded = self._record(outcomes)
        self._notify(recorded)

    def put_aside(self, prompt: Prompt, reason: str) -> None:
        """Fail a prompt whose document cannot be written: the run goes on without it, and reports it.

        Its document stays as it is. Raises DatabaseFailed if there are too many.
        """
        if not self._run.excluded.put_aside(prompt.id, reason):
            return
        url = None
        if prompt.webhook_url is not None:
            with suppress(PromptFailed):
                url = self._deps.webhook_hosts.check(prompt.webhook_url)
        failed = Failed(
            prompt=replace(prompt, webhook_url=url),
            code=ErrorCode.INVALID_DOCUMENT,
            message=reason,
            attempts=prompt.attempts,
            written=False,
        )
        self._run.unwritable(failed)
        self._notify([failed])

    def _finish_image(
        self, request: Request, image: GeneratedImage | StoredImage | PromptFailed | None
    ) -> Outcome | None:
        """Encode, store and score one image; return its outcome.

        Returns None where the image was not needed (see is_needed), or the claim turned out to be lost.
        """
        if image is None:
            return None
        if isinstance(image, StoredImage):
            return self._finish_stored(request, image)
        try:
            if isinstance(image, PromptFailed):
                raise image
            request = _as_generated(request, image)
            file, used = self._encode(request, image)
            existing = ExistingImage(file.data, request.prompt.recorded_hashes)
            url = self._store(request, file, existing)
            if existing.pixels is not None:
                image = replace(image, pixels=existing.pixels)
            stored = StoredImage(
                image_url=url,
                sha256=existing.sha256,
                used=used,
                text=request.text,
                number=request.number,
                iteration=request.iteration,
                truncated=image.truncated,
                negative_left_out=request.negative_left_out,
            )
            return self._scored(request, stored, image.pixels)
        except PromptFailed as exc:
            return failure(request.prompt, exc, self._deps.max_attempts)
        except ClaimLost:
            self._mark_lost([request.prompt.claim])
            return None

    def _encode(self, request: Request, image: GeneratedImage) -> tuple[File, dict[str, object]]:
        """Return the file of the image, with its parameters in it, and the parameters that were used."""
        info = self._model_info
        made: dict[str, Any] = {"scheduler": image.scheduler, "model": info.name}
        parts = {**info.parts, **info.approximations}
        embedded = parameters(request, revision=info.revision, approximations=parts, **made)
        with self._encoders, self._run.seconds("encode", request):
            file = self._deps.encoder.encode(image.pixels, request.parameters, embedded)
        with self._run.seconds("encode", request):  # outside: a time-stamping service may be slow
            file = self._deps.encoder.sign(file, embedded, image.delivered)
        return file, {**request.parameters.recorded, **made, **parts, **image.provider_metadata}

    def _store(self, request: Request, file: File, existing: ExistingImage) -> str:
        """Upload the file under its name; return its URL. Raises the errors of ImageStorage.put."""
        name = self._deps.object_name.name_of(request) + file.ending
        still_ours = partial(self._run.database.queue.holds, request.prompt.claim)
        with self._run.seconds("upload", request):
            return self._deps.storage.put(name, file.data, file.content_type, still_ours, existing.classify)

    def _finish_stored(self, request: Request, stored: StoredImage) -> Outcome:
        """Score an image that was stored before; return its outcome, without an image if it is gone."""
        try:
            if not self._is_own(request, stored):
                raise ObjectUnreadable("the image that its document lists is not its own")  # noqa: TRY301
            if stored.evaluation is not None:
                return Completed(prompt=request.prompt, text=request.original_text, images=(stored,))
            pixels = decode(self._deps.storage.read(stored.image_url))
        except ObjectUnreadable as exc:
            log.warning("%s will be generated again: %s", request.prompt.id, exc)
            return AwaitsScore(prompt=request.prompt, text=request.original_text, images=())
        return self._scored(request, stored, pixels)

    def _is_own(self, request: Request, stored: StoredImage) -> bool:
        """Return True if the image has the request's name: a document may list any image."""
        path, _, _ = stored.image_url.rpartition(".")
        return path.endswith(f"/{self._deps.object_name.name_of(request)}")

    def _scored(self, request: Request, stored: StoredImage, pixels: NDArray[np.uint8]) -> Outcome:
        """Return the outcome of a stored image: completed with its score, or waiting for it."""
        text = request.original_text
        try:
            evaluation = self._evaluate(request, pixels)
        except EvaluatorFailed as exc:
            self._evaluator_failure = exc
            return AwaitsScore(prompt=request.prompt, text=text, images=(stored,))
        image = replace(stored, evaluation=evaluation)
        return Completed(prompt=request.prompt, text=text, images=(image,))

    def _evaluate(self, request: Request, pixels: NDArray[np.uint8]) -> Evaluation | None:
        """Return the evaluator's score of an image that has been stored; None without an evaluator.

        Raises EvaluatorFailed if no image can be scored. Raises Stopped in a loop that is stopped before the
        score is there: without a score the loop could not end, so the claim is released and the iteration is
        made again.
        """
        evaluator = self._deps.evaluator
        if evaluator is None or self._scorer is None:
            return None
        with self._run.seconds("evaluate", request):
            try:
                return self._scorer.score(pixels, request.original_text)
            except EvaluatorFailed:
                raise
            except TimeoutError:
                if self._deps.loop is not None:
                    self._run.stop.check()
                reason = "there was no score in time"
            except EvaluationFailed as exc:
                reason = str(exc)
            except Exception as exc:  # the image is kept, whatever error the evaluator has
                log.debug("the evaluator failed on %s", request.prompt.id, exc_info=exc)
                reason = f"the evaluator failed unexpectedly: {type(exc).__name__}"
        log.warning("%s has no score: %s", request.prompt.id, reason)
        return Evaluation(evaluator=evaluator.name, error=reason)

    def _write_sidecars(self, outcomes: Sequence[Outcome]) -> None:
        """Write the files beside the images, before the outcomes are recorded; only with --layout folders.

        They are an iteration's results and evaluations, and a prompt's summary: see Sidecars.
        """
        if self._sidecars is None:
            return
        with self._run.seconds("upload", *outcomes):
            for written in [self._pool.submit(self._sidecars.write, outcome) for outcome in outcomes]:
                written.result()

    def _record(self, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """Record the outcomes whose claims are held; return them."""
        run = self._run
        with run.seconds("record", *outcomes):
            recorded = run.database.queue.record(
                outcomes, run.run_id, notify=run.notify, put_aside=self.put_aside
            )
        run.excluded.recorded(outcome.claim.id for outcome in recorded)
        lost = {outcome.claim for outcome in outcomes} - {outcome.claim for outcome in recorded}
        lost = {claim for claim in lost if not run.excluded.is_unwritable(claim.id)}
        run.excluded.lost(claim.id for claim in lost)
        self._mark_lost(lost)
        run.leases.forget(outcome.claim for outcome in outcomes)
        return recorded

    def _notify(self, recorded: Sequence[Outcome]) -> None:
        """Update the budget, the counters, the progress bar and the log, and wake the dispatchers.

        What is to be delivered has been marked in the database by Queue.record, with the outcomes.
        """
        retries = [outcome.wait for outcome in recorded if isinstance(outcome, RetryLater)]
        refinements = [0.0 for outcome in recorded if isinstance(outcome, NeedsRefinement | AwaitsScore)]
        self._budget.requeued(retries + refinements)
        self._run.stats.add(recorded)
        self._run.progress.recorded(recorded)
        self._run.recorded(recorded)
        for outcome in recorded:
            _log(outcome)

    def _mark_lost(self, claims: Collection[Claim]) -> None:
        self._run.leases.mark_lost(claims)
        for claim in claims:
            log.warning("lost the claim on %s; discarding its image", claim.id)


def _as_generated(request: Request, image: GeneratedImage) -> Request:
    """Return the request with the size and seed that the image really has: what is recorded must be true."""
    height, width = image.pixels.shape[:2]
    wanted = request.parameters
    if (width, height) != (wanted.width, wanted.height):
        wanted = replace(wanted, width=width, height=height, aspect_ratio=None)
    if image.seed is not None:
        wanted = replace(wanted, seed=image.seed)
    return request if wanted is request.parameters else replace(request, parameters=wanted)


def _or_best(outcome: Outcome) -> Outcome:
    """Return the outcome; for a failed iteration, the best image that the loop has made before it."""
    kept = fall_back_to_best(outcome)
    if isinstance(outcome, Failed) and kept is not outcome:
        why = (outcome.claim.id, outcome.message, outcome.code)
        log.warning("%s keeps its best iteration: %s (%s)", *why)
    return kept


def _log(outcome: Outcome) -> None:
    facts: dict[str, object] = {"event": "prompt", "prompt_id": str(outcome.claim.id)}
    if isinstance(outcome, Completed | NeedsRefinement):
        fate = "completed" if isinstance(outcome, Completed) else "not good enough yet:"
        log.info("%s %s%s", fate, outcome.claim.id, _in_words(outcome), extra=facts | _facts(outcome))
        return
    if isinstance(outcome, AwaitsScore):
        log.info("%s waits for its score", outcome.claim.id, extra=facts)
        return
    fate = "failed" if isinstance(outcome, Failed) else f"will be tried again in {outcome.wait:g} s"
    log.warning(
        "%s %s: %s (%s)",
        outcome.claim.id,
        fate,
        outcome.message,
        outcome.code,
        extra=facts | {"error_code": str(outcome.code)},
    )


def _facts(outcome: Completed | NeedsRefinement) -> dict[str, object]:
    facts: dict[str, object] = {"images": outcome.images_made}
    facts |= (
        {"image_url": outcome.first.image_url} if isinstance(outcome, Completed) else {"event": "iteration"}
    )
    score = outcome.first.score
    facts |= {} if score is None else {"score": score}
    return facts | ({"iterations": outcome.iterations} if outcome.tries else {})


def _in_words(outcome: Completed | NeedsRefinement) -> str:
    """Return the best score and the number of iterations, for a log line; empty where there are none."""
    score = outcome.first.score
    words = "" if score is None else f", score {score:.2f}"
    plural = "s" if outcome.iterations > 1 else ""
    return f"{words} after {outcome.iterations} iteration{plural}" if outcome.tries else words


class ExistingImage:
    """What may become of an image that is stored already under the name of the new one, ``data``.

    ``recorded`` are the hashes of the images that may be replaced. ``sha256`` is the stored image's: the new
    one's unless the existing one was kept; then ``pixels`` are the existing one's.
    """

    def __init__(self, data: bytes, recorded: Collection[str]) -> None:
        self._duplicate, self._recorded = Duplicate(data), recorded
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.pixels: NDArray[np.uint8] | None = None

    def classify(self, existing: bytes) -> Existing:
        """Return SAME for an image of the same parameters, OURS for a recorded one, else FOREIGN."""
        sha256 = hashlib.sha256(existing).hexdigest()
        same = self._duplicate.matches(existing)
        if not same and sha256 in self._recorded:
            return Existing.OURS
        if not same and not self._duplicate.matches(existing, any_version=True):
            return Existing.FOREIGN
        self.sha256, self.pixels = sha256, self._duplicate.pixels
        return Existing.SAME


class ImageGroups:
    """Collects the outcomes of a prompt's images until all are there. Safe to use from several threads.

    With a ``loop`` the images are candidates, of which the best is kept.
    """

    def __init__(self, loop: Loop | None = None) -> None:
        self._loop = loop
        self._open: dict[Claim, list[Outcome | None]] = {}
        self._lock = threading.Lock()

    def add(self, request: Request, outcome: Outcome | None) -> Outcome | None:
        """Add an image's outcome; return the prompt's when all of its images have been added, else None.

        ``outcome`` is the prompt's outcome as if this were its only image. It is None if there is no image,
        because the claim is lost or another of the prompt's images failed. Each image must be added once.
        """
        claim = request.prompt.claim
        with self._lock:
            group = self._open.setdefault(claim, [])
            group.append(outcome)
            if len(group) < request.num_images:
                return None
            del self._open[claim]
        return _merged(group) if self._loop is None else self._loop.decide(request, group)

    def has_failed(self, claim: Claim) -> bool:
        """Return whether an added image of the claim is missing for good, so that the others are of no use.

        In a loop a failed candidate is not missing: the others are used without it.
        """
        with self._lock:
            group = self._open.get(claim, ())
        if self._loop is not None:
            return None in group
        return not all(isinstance(outcome, Completed | AwaitsScore) for outcome in group)


def _merged(group: Sequence[Outcome | None]) -> Outcome | None:
    """Return the first failure, permanent ones first; else all images, or None if one is missing."""
    if failed := first_failure(group):
        return failed
    done = [outcome for outcome in group if isinstance(outcome, Completed | AwaitsScore)]
    if len(done) < len(group):
        return None
    if waiting := awaiting_score(group):
        return waiting
    stored = sorted((image for each in done for image in each.images), key=lambda image: image.number)
    return replace(done[0], images=tuple(stored))
