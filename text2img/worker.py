"""The flow: claim → generate → encode → store → record → notify.

One thread owns the device. Beside it, one claims and groups what comes next, two finish the batches before
(encode, upload, write back), one keeps the leases alive and one tells the callback's receiver. The worker
knows its parts only by their Protocols: no database, no storage, no model, no signal.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from text2img.errors import ClaimLost, PromptFailed
from text2img.images import CONTENT_TYPE, ENDING, encode_png, parameters
from text2img.prompts import Completed, Failed, Postponed, failure, request
from text2img.prompts.batches import Batcher
from text2img.stages import Ahead, Stage

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from text2img.databases import Database, Selection
    from text2img.engine import Engine, ModelCard, Picture
    from text2img.guard import Guard
    from text2img.leases import Leases
    from text2img.progress import Progress
    from text2img.prompts import Claim, Outcome, Prompt, Request, Wishes
    from text2img.stages import Stop, Stopwatch
    from text2img.storage import ImageStorage
    from text2img.tally import Tally

log = logging.getLogger(__name__)

LONGEST_WAIT_FOR_A_RETRY = 30.0
"""Seconds; what comes due later is left to a later run."""
BATCHES_AHEAD = 4
"""How many batches' worth of prompts are claimed to find company for odd ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one run shall do. ``wishes`` are the run's own, the most specific first."""

    run_id: str
    worker: str
    selection: Selection
    wishes: Sequence[Wishes]
    batch_size: int = 10
    limit: int | None = None
    max_attempts: int = 3
    upload_workers: int = 16
    tell: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a worker works with, all of it ready to use.

    ``seconds`` adds up the stages' time; ``recorded`` is called with how many outcomes became final.
    """

    database: Database
    storage: ImageStorage
    engine: Engine
    card: ModelCard
    leases: Leases
    guard: Guard
    progress: Progress
    seconds: Stopwatch
    recorded: Callable[[int], None]


class Worker:
    """Works through the pending prompts of one selection, then returns."""

    def __init__(self, parts: Parts, plan: Plan, stop: Stop, tally: Tally) -> None:
        self._parts, self._plan, self._stop, self._tally = parts, plan, stop, tally
        self._database, self._engine = parts.database, parts.engine
        self._leases = parts.leases
        self._left = plan.limit if plan.limit is not None else 2**63
        self._retries: list[float] = []
        self._lock = threading.Lock()

    def run(self) -> None:
        """The whole flow, until nothing is left to claim.

        Raises RunFailed when a part has failed and Stopped when the run was asked to end. Either way the
        pictures that are finished are stored and recorded first, and the claims that are left released.
        """
        with self._leases, ThreadPoolExecutor(self._plan.upload_workers, "store") as self._uploads:
            while True:
                with (
                    Stage("finish", self._finish, threads=2, room=1) as finish,
                    Ahead(self._batches(), room=1) as batches,
                ):
                    for batch in map(self._ours, batches):
                        finish.put((batch, self._generate(batch)))
                if not self._retry_comes_due():
                    return

    def _batches(self) -> Iterator[list[Request]]:
        """Claim and group what the device gets next, until nothing is left to claim."""
        batcher = Batcher(self._plan.batch_size)
        while claimed := self._claim():
            batcher.add(self._prepare(claimed))
            while batcher.full() or len(batcher) >= BATCHES_AHEAD * self._plan.batch_size:
                yield batcher.take()
        while batch := batcher.take():
            yield batch

    def _claim(self) -> list[Prompt]:
        self._stop.check()
        plan, limit = self._plan, min(self._plan.batch_size, self._left)
        if limit == 0:
            return []
        with self._parts.seconds("claim"):
            prompts = self._database.claim(plan.worker, limit, self._leases.seconds, plan.selection)
        self._leases.hold(prompt.claim for prompt in prompts)
        with self._lock:
            self._left -= len(prompts)
        return prompts

    def _prepare(self, prompts: Sequence[Prompt]) -> list[Request]:
        """The requests among the prompts; those that cannot become one are recorded as failed."""
        ready: list[Request] = []
        refused: list[Outcome] = []
        for prompt in prompts:
            try:
                ready.append(self._engine.prepare(request(prompt, self._plan.wishes)))
            except PromptFailed as exc:
                refused.append(failure(prompt, exc, self._plan.max_attempts))
        self._settle(refused)
        return ready

    def _ours(self, batch: list[Request]) -> list[Request]:
        """What of the batch was not lost while it waited: whoever slept does not make what others have."""
        return [request for request in batch if self._leases.holds(request.prompt.claim)]

    def _generate(self, batch: list[Request]) -> list[Picture | PromptFailed]:
        """The batch's pictures; that it is on the device is written down while the device works."""
        self._stop.check()
        if not batch:
            return []
        started = time.monotonic()
        with ThreadPoolExecutor(1, "mark") as aside, self._parts.guard.watching():
            marked = aside.submit(self._database.start, [request.prompt.claim for request in batch])
            results = self._engine.generate(batch, self._step)
        self._tally.batch(started, time.monotonic())
        marked.result()
        log.debug("generated a batch of %d", len(batch), extra={"event": "batch", "size": len(batch)})
        return results

    def _step(self, done: int, of: int) -> None:
        self._parts.guard.pulse()
        self._stop.check()
        self._parts.progress.step(done, of)

    def _finish(self, made: tuple[list[Request], list[Picture | PromptFailed]]) -> None:
        """Encode, store and record a batch; what could be stored is recorded even if the rest could not."""
        stored = [self._uploads.submit(self._outcome, *each) for each in zip(*made, strict=True)]
        wait(stored)
        faults = [fault for future in stored if (fault := future.exception())]
        outcomes = [outcome for future in stored if not future.exception() and (outcome := future.result())]
        self._settle(outcomes)
        if faults:
            raise faults[0]

    def _outcome(self, request: Request, result: Picture | PromptFailed) -> Outcome | None:
        """What becomes of one request; None where its claim was lost."""
        if isinstance(result, PromptFailed):
            return failure(request.prompt, result, self._plan.max_attempts)
        try:
            return self._store(request, result)
        except PromptFailed as exc:
            return failure(request.prompt, exc, self._plan.max_attempts)
        except ClaimLost:
            self._lost([request.prompt.claim])
            return None

    def _store(self, request: Request, picture: Picture) -> Completed:
        card, claim = self._parts.card, request.prompt.claim
        facts = parameters(request, scheduler=picture.scheduler, model=card.name, revision=card.revision)
        with self._parts.seconds("encode"):
            data = encode_png(picture.pixels, facts)
        name, still_ours = claim.id.name + ENDING, partial(self._database.holds, claim)
        with self._parts.seconds("upload"):
            url = self._parts.storage.put(name, data, CONTENT_TYPE, still_ours)
        return Completed(
            request=request,
            image_url=url,
            sha256=hashlib.sha256(data).hexdigest(),
            scheduler=picture.scheduler,
            model=card.name,
            truncated=picture.truncated,
        )

    def _settle(self, outcomes: Sequence[Outcome]) -> None:
        """Record outcomes, and let everybody know of those that were: the rest had lost their claim."""
        if not outcomes:
            return
        with self._parts.seconds("record"):
            recorded = self._database.record(outcomes, self._plan.run_id, tell=self._plan.tell)
        self._leases.drop(outcome.claim for outcome in outcomes)
        self._lost({outcome.claim for outcome in outcomes} - {outcome.claim for outcome in recorded})
        again = [outcome for outcome in recorded if isinstance(outcome, Postponed)]
        with self._lock:
            self._retries += [time.monotonic() + outcome.wait for outcome in again]
            self._left += len(again)
        self._tally.add(recorded)
        self._parts.progress.settled(recorded)
        self._parts.recorded(len(recorded) - len(again))
        for outcome in recorded:
            _log(outcome)

    def _lost(self, claims: Collection[Claim]) -> None:
        self._leases.drop(claims)
        for claim in claims:
            log.warning("%s is another worker's now; what was made for it here is dropped", claim.id)

    def _retry_comes_due(self) -> bool:
        """Wait for the next of this run's own retries, if it comes soon enough to wait for."""
        now = time.monotonic()
        if not self._retries or self._left == 0 or min(self._retries) > now + LONGEST_WAIT_FOR_A_RETRY:
            return False
        due = min(self._retries)
        log.info("waiting %.0f s for a prompt that is tried again", max(0.0, due - now))
        self._stop.wait(due - now)
        self._retries = [moment for moment in self._retries if moment > due]
        return True


def _log(outcome: Outcome) -> None:
    facts: dict[str, object] = {"event": "prompt", "prompt_id": str(outcome.claim.id)}
    if isinstance(outcome, Completed):
        log.info("completed %s", outcome.claim.id, extra=facts | {"image_url": outcome.image_url})
        return
    fate = "failed" if isinstance(outcome, Failed) else f"will be tried again in {outcome.wait:g} s"
    log.warning(
        "%s %s: %s (%s)",
        outcome.claim.id,
        fate,
        outcome.sentence,
        outcome.code,
        extra=facts | {"error_code": str(outcome.code)},
    )
