"""What becomes of a batch once the device has made it: encode → store → evaluate → record.

Knows pictures, the storage and the database's queue; does not know how pictures come about.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import ClaimLost, EvaluationFailed, PromptFailed
from text2img.images import parameters
from text2img.prompts import Completed, Failed, NeedsRefinement, RetryLater, StoredImage, failure
from text2img.prompts.outcomes import Evaluation
from text2img.prompts.refinement import fall_back_to_best, first_failure

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from text2img.concurrency.signals import Stop
    from text2img.engine import Picture
    from text2img.prompts import Claim, Outcome, Request
    from text2img.prompts.refinement import Loop
    from text2img.telemetry.stats import RunStats
    from text2img.worker.build import Plan, WorkerDeps
    from text2img.worker.polling import ClaimBudget


log = logging.getLogger(__name__)

_JUDGED_WITHIN = 300.0
"""Seconds for one picture's score; when the run is stopped, none is waited for any longer."""
_ENCODERS = 4
"""Pictures encoded at once. Uploads wait for the network, so that many threads serve; encoding needs cores,
and more threads at it than there are only keep the device's thread from its turn."""


class PostProcessor:
    """Finishes one run's batches, several at a time. Leaving the ``with`` block waits for all of them."""

    def __init__(
        self, parts: WorkerDeps, plan: Plan, quota: ClaimBudget, stats: RunStats, stop: Stop
    ) -> None:
        self._stop = stop
        self._parts, self._plan, self._quota, self._tally = parts, plan, quota, stats
        self._pool = ThreadPoolExecutor(plan.upload_workers, "store")
        self._encoders = threading.BoundedSemaphore(_ENCODERS)
        self._albums = ImageGroups(plan.loop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def wants(self, request: Request) -> bool:
        """Whether the picture is still of use: its claim was not lost while it waited (whoever slept does not
        make what others have), and none of its prompt's pictures failed.
        """
        claim = request.prompt.claim
        return self._parts.leases.holds(claim) and not self._albums.has_failed(claim)

    def store(
        self,
        hand_on: Callable[[list[Outcome]], None],
        made: tuple[Sequence[Request], Sequence[Picture | PromptFailed | None]],
    ) -> None:
        """Encode and store a batch (None: a picture that was of no use); of prompts that have all of their
        pictures now, what could be stored is handed on even if the rest could not.
        """
        stored = [self._pool.submit(self._outcome, *each) for each in zip(*made, strict=True)]
        wait(stored)
        faults = [fault for future in stored if (fault := future.exception())]
        settled = [
            self._albums.add(request, future.result())
            for request, future in zip(made[0], stored, strict=True)
            if not future.exception()
        ]
        hand_on([outcome for outcome in settled if outcome])
        if faults:
            raise faults[0]

    def record(self, outcomes: Sequence[Outcome]) -> None:
        """Record outcomes, and let everybody know of those that were: the rest had lost their claim."""
        outcomes = [_rescued(outcome) for outcome in outcomes] if self._plan.loop else outcomes
        self._write_beside(outcomes)
        with self._parts.seconds("record", *outcomes):
            recorded = self._parts.database.record(outcomes, self._plan.run_id, tell=self._plan.tell)
        self._lost({outcome.claim for outcome in outcomes} - {outcome.claim for outcome in recorded})
        self._parts.leases.forget(outcome.claim for outcome in outcomes)
        again = [outcome.wait for outcome in recorded if isinstance(outcome, RetryLater)]
        again += [0.0 for outcome in recorded if isinstance(outcome, NeedsRefinement)]
        self._quota.requeued(again)
        self._tally.add(recorded)
        self._parts.progress.settled(recorded)
        self._parts.recorded(recorded)
        for outcome in recorded:
            _log(outcome)

    def _write_beside(self, outcomes: Sequence[Outcome]) -> None:
        """What stands beside the pictures, before it is recorded that there is no more to do."""
        if self._parts.sidecars is None:
            return
        with self._parts.seconds("upload", *outcomes):
            for done in [self._pool.submit(self._parts.sidecars.write, outcome) for outcome in outcomes]:
                done.result()

    def _outcome(self, request: Request, result: Picture | PromptFailed | None) -> Outcome | None:
        """What becomes of one request; None where its claim was lost, or its picture of no use."""
        if result is None:
            return None
        if isinstance(result, PromptFailed):
            return failure(request.prompt, result, self._plan.max_attempts)
        try:
            return self._store(request, result)
        except PromptFailed as exc:
            return failure(request.prompt, exc, self._plan.max_attempts)
        except ClaimLost:
            self._lost([request.prompt.claim])
            return None

    def _store(self, asked: Request, image: Picture) -> Completed:
        request = _as_made(asked, image)
        model_info, claim = self._parts.model_info, request.prompt.claim
        made: dict[str, Any] = {"scheduler": image.scheduler, "model": model_info.name}
        facts = parameters(
            request, revision=model_info.revision, approximations=model_info.approximations, **made
        )
        with self._encoders, self._parts.seconds("encode", request):
            file = self._parts.encoder.encode(image.pixels, request.parameters, facts)
        name = self._plan.object_name.name_of(request) + file.ending
        still_ours = partial(self._parts.database.holds, claim)
        with self._parts.seconds("upload", request):
            url = self._parts.storage.put(name, file.data, file.content_type, still_ours)
        stored = StoredImage(
            image_url=url,
            sha256=hashlib.sha256(file.data).hexdigest(),
            used={**request.parameters.recorded, **made, **model_info.approximations, **image.notes},
            text=request.text,
            number=request.number,
            iteration=request.iteration,
            truncated=image.truncated,
            evaluation=self._evaluated(image, request),
        )
        return Completed(prompt=request.prompt, text=request.original_text, pictures=(stored,))

    def _evaluated(self, image: Picture, request: Request) -> Evaluation | None:
        """What the evaluator, if there is one, says of the picture, which is stored already.

        Raises Stopped in a loop that has to end before it has spoken: no score would end the prompt's loop,
        so its claim is given back, and the iteration made again.
        """
        evaluator = self._parts.evaluator
        if evaluator is None:
            return None
        with self._parts.seconds("evaluate", request):
            judge = partial(evaluator.evaluate, image.pixels, request.original_text)
            try:
                return run_with_timeout(_JUDGED_WITHIN, judge, unless=self._stop.event)
            except TimeoutError:
                if self._plan.loop is not None:
                    self._stop.check()
                reason = "there was no score in time"
            except EvaluationFailed as exc:
                reason = str(exc)
            except Exception as exc:  # whatever it stumbles over, the picture is kept
                log.debug("the evaluator stumbled over %s", request.prompt.id, exc_info=exc)
                reason = f"the evaluator failed unexpectedly: {type(exc).__name__}"
        log.warning("%s has no score: %s", request.prompt.id, reason)
        return Evaluation(evaluator=evaluator.name, error=reason)

    def _lost(self, claims: Collection[Claim]) -> None:
        self._parts.leases.mark_lost(claims)
        for claim in claims:
            log.warning("%s is another worker's now; what was made for it here is dropped", claim.id)


def _as_made(request: Request, image: Picture) -> Request:
    """The request with the size and the seed that the picture really has: what is recorded must be true."""
    height, width = image.pixels.shape[:2]
    wanted = request.parameters
    if (width, height) != (wanted.width, wanted.height):
        wanted = replace(wanted, width=width, height=height, aspect_ratio=None)
    if image.seed is not None:
        wanted = replace(wanted, seed=image.seed)
    return request if wanted is request.parameters else replace(request, parameters=wanted)


def _rescued(outcome: Outcome) -> Outcome:
    kept = fall_back_to_best(outcome)
    if isinstance(outcome, Failed) and kept is not outcome:
        why = (outcome.claim.id, outcome.message, outcome.code)
        log.warning("%s goes no further than its best try: %s (%s)", *why)
    return kept


def _log(outcome: Outcome) -> None:
    facts: dict[str, object] = {"event": "prompt", "prompt_id": str(outcome.claim.id)}
    if isinstance(outcome, Completed | NeedsRefinement):
        fate = "completed" if isinstance(outcome, Completed) else "not good enough yet:"
        log.info("%s %s%s", fate, outcome.claim.id, _in_words(outcome), extra=facts | _facts(outcome))
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
    facts: dict[str, object] = {"images": outcome.made}
    facts |= (
        {"image_url": outcome.first.image_url} if isinstance(outcome, Completed) else {"event": "iteration"}
    )
    score = outcome.first.score
    facts |= {} if score is None else {"score": score}
    return facts | ({"iterations": outcome.iterations} if outcome.tries else {})


def _in_words(outcome: Completed | NeedsRefinement) -> str:
    """The best score so far, and after how many iterations; nothing where there is neither."""
    score = outcome.first.score
    words = "" if score is None else f", score {score:.2f}"
    plural = "s" if outcome.iterations > 1 else ""
    return f"{words} after {outcome.iterations} iteration{plural}" if outcome.tries else words


class ImageGroups:
    """The pictures so far of each claim that has not got all of its own. Safe to use from several threads.

    With a ``loop`` they are candidates, of which it keeps the best.
    """

    def __init__(self, loop: Loop | None = None) -> None:
        self._loop = loop
        self._open: dict[Claim, list[Outcome | None]] = {}
        self._lock = threading.Lock()

    def add(self, request: Request, became: Outcome | None) -> Outcome | None:
        """The prompt's outcome, if all of its pictures have been added now; else None.

        ``became`` is what the prompt would be with this picture alone; None: there is no picture, since the
        claim is lost or another of the prompt's pictures failed. Each picture has to be added once.
        """
        claim = request.prompt.claim
        with self._lock:
            pictures = self._open.setdefault(claim, [])
            pictures.append(became)
            if len(pictures) < request.pictures:
                return None
            del self._open[claim]
        return _together(pictures) if self._loop is None else self._loop.settle(request, pictures)

    def has_failed(self, claim: Claim) -> bool:
        """Whether a picture of the claim is missing for good: the others would be made for nothing."""
        with self._lock:
            pictures = self._open.get(claim, ())
        if self._loop is not None:
            return None in pictures
        return not all(isinstance(became, Completed) for became in pictures)


def _together(pictures: Sequence[Outcome | None]) -> Outcome | None:
    """One failure is the prompt's, first of all one for good; with a claim that is lost there is nothing."""
    if failed := first_failure(pictures):
        return failed
    done = [became for became in pictures if isinstance(became, Completed)]
    if len(done) < len(pictures):
        return None
    stored = sorted((each for one in done for each in one.pictures), key=lambda each: each.number)
    return replace(done[0], pictures=tuple(stored))
