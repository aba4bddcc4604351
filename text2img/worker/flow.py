"""The flow: claim → generate → encode → store → record → notify.

One thread owns the device. Beside it, one claims and groups what comes next, a few fetch LoRAs, two finish
the batches before (encode, upload), two write back, one keeps the leases alive and one tells the callback's
receiver. The worker knows its parts only by their Protocols: no database, no storage, no model, no signal.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import TYPE_CHECKING

from text2img.concurrency.stages import BatchPrefetcher, Stage, WriteBuffer
from text2img.engine.loras.prefetch import LoraPrefetcher
from text2img.errors import PromptFailed
from text2img.prompts import failure, request
from text2img.prompts.batching import Batcher, FastestSize, FixedSize
from text2img.worker.build import Plan, WorkerDeps
from text2img.worker.finish import PostProcessor
from text2img.worker.polling import ClaimBudget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from text2img.concurrency.signals import Stop
    from text2img.engine import Picture
    from text2img.prompts import Claim, Outcome, Prompt, Request
    from text2img.telemetry.stats import RunStats

__all__ = ["Plan", "Worker", "WorkerDeps"]

log = logging.getLogger(__name__)

MAX_RETRY_WAIT = 30.0
"""Seconds; what comes due later is left to a later run."""
CLAIM_DOUBLE_THRESHOLD = 8
"""While so many batches' worth of prompts wait, two batches' worth are claimed at once: fewer commands, and
most are left to others. Where many workers share them, the last to come may still go empty-handed."""
UNBOUNDED_RUN = 1_000_000
"""Pictures that a server is taken to make yet: whatever pays in the long run pays for it."""
MAX_PREFETCH_BATCHES = 6
"""While more than so many batches' worth of prompts wait for their LoRAs, no more are claimed."""
OUTCOME_FLUSH_DELAY = 5.0
"""Seconds that the outcomes of a small batch wait for those of the next, to be written down together."""


class Worker:
    """Works through the pending prompts of one selection, in rounds: each ends when nothing is left to claim.

    A run has one, and another for its own retries; a server waits for the next until it has waited enough.
    ``clock`` says when a retry is due; it is ``stop`` that waits for it.
    """

    def __init__(
        self,
        parts: WorkerDeps,
        plan: Plan,
        stop: Stop,
        stats: RunStats,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._parts, self._plan, self._stop, self._tally = parts, plan, stop, stats
        self._database, self._engine = parts.database, parts.engine
        self._leases = parts.leases
        self._sizes = (FastestSize if plan.fastest_size else FixedSize)(plan.batch_size)
        self._quota = ClaimBudget(plan.limit, plan.waiting, parts.more, clock=clock)
        self._loaded: Future[None] = Future()
        self._on_device: list[Claim] = []

    def run(self) -> None:
        """The whole flow, round by round; the model is loaded while the first prompts are claimed.

        Raises RunFailed when a part has failed and Stopped when the run was asked to end. Either way the
        pictures that are finished are stored and recorded first, and the claims that are left released.
        """
        with (
            self._leases,
            ThreadPoolExecutor(1, "mark") as self._aside,
            PostProcessor(self._parts, self._plan, self._quota, self._tally, self._stop) as finishing,
        ):
            while True:
                with (
                    self._gathering(finishing.record) as record,
                    Stage("finish", partial(finishing.store, record.put), threads=2, room=1) as finish,
                    BatchPrefetcher(self._batches(record), room=1) as batches,
                ):
                    self._load()
                    for batch in self._parts.seconds.each("wait", batches):
                        made = self._made(batch, finishing.wants)
                        with self._parts.seconds("wait"):
                            finish.put((batch, made))
                if not self._another_round():
                    return

    def _load(self) -> None:
        """Put the weights on the device; whoever waits for them learns it, also if they cannot be had."""
        if self._loaded.done():
            return
        started = time.monotonic()
        try:
            self._engine.load()
            self._parts.traces.device("load", started)
            if self._parts.evaluator is not None:
                self._parts.evaluator.load()
        except BaseException as exc:
            self._loaded.set_exception(exc)
            raise
        name = self._parts.model_info.name
        log.info("loaded %s", name, extra={"event": "loaded", "model": name})
        self._loaded.set_result(None)

    def _batches(self, record: WriteBuffer[Outcome]) -> Iterator[list[Request]]:
        """Claim and group what the device gets next, until nothing is left to claim."""
        batcher = Batcher(self._sizes)
        with LoraPrefetcher(self._parts.loras) as fetching:
            while claimed := self._claim():
                ready, refused = self._prepare(claimed)
                record.put(refused)
                fetching.put(ready)
                batcher.add(self._fetched(fetching, record, leave=fetching.waiting))
                room = MAX_PREFETCH_BATCHES * self._sizes.usual
                while batcher.ready() or (len(batcher) and fetching.waiting > room):
                    yield batcher.take()
                batcher.add(self._fetched(fetching, record, leave=room))
            while len(batcher) or fetching.waiting:  # for a LoRA only where there is nothing else to draw
                leave = fetching.waiting - (0 if len(batcher) else 1)
                batcher.add(self._fetched(fetching, record, leave=leave))
                if batch := batcher.take():
                    yield batch

    def _gathering(self, work: Callable[[list[Outcome]], None]) -> WriteBuffer[Outcome]:
        """Outcomes on their way to be recorded: a usual batch's worth at once."""
        return WriteBuffer(work, threads=2, enough=lambda: self._sizes.usual, patience=OUTCOME_FLUSH_DELAY)

    def _claim(self) -> list[Prompt]:
        self._stop.check()
        plan, size = self._plan, self._prompts_a_batch()
        wanted = self._quota.take(
            2 * size if self._quota.remaining() >= CLAIM_DOUBLE_THRESHOLD * size else size
        )
        if wanted == 0:
            return []
        with self._parts.seconds("claim"):
            prompts = self._database.claim(plan.worker, wanted, self._leases.seconds, plan.selection)
        self._leases.hold(prompt.claim for prompt in prompts)
        self._quota.claimed(len(prompts))
        return prompts

    def _prepare(self, prompts: Sequence[Prompt]) -> tuple[list[Request], list[Outcome]]:
        """The requests among the prompts, once the model is loaded, and the failures of the others."""
        self._loaded.result()
        ready: list[Request] = []
        refused: list[Outcome] = []
        for claimed in prompts:
            prompt = replace(claimed, webhook_url=None)  # nobody is told before it is known who may be
            try:
                prompt = self._addressed(claimed)
                asked = request(prompt, self._plan.requested, self._plan.multiple)
                asked = self._plan.loop.next(asked) if self._plan.loop else asked
                self._parts.encoder.check(asked.parameters)
                ready.append(self._engine.prepare(asked))
            except PromptFailed as exc:
                refused.append(failure(prompt, exc, self._plan.max_attempts))
        self._quota.prepared(len(ready), sum(each.pictures for each in ready))
        return ready, refused

    def _fetched(
        self, fetching: LoraPrefetcher, record: WriteBuffer[Outcome], *, leave: int
    ) -> list[Request]:
        """The pictures of those whose LoRAs are here; failures are recorded. Waits as ``take`` does."""
        done = fetching.take(leave=leave)
        failed = [failure(asked.prompt, exc, self._plan.max_attempts) for asked, exc in done if exc]
        record.put(failed)
        return [image for asked, exc in done if exc is None for image in asked.each()]

    def _addressed(self, prompt: Prompt) -> Prompt:
        """The prompt, whose webhook may be told: from here on it counts as checked."""
        if prompt.webhook_url is None:
            return prompt
        return replace(prompt, webhook_url=self._parts.webhook_hosts.check(prompt.webhook_url))

    def _prompts_a_batch(self) -> int:
        """How many prompts fill a usual batch with their pictures, as far as they are known."""
        return max(1, round(self._sizes.usual / self._quota.pictures_each()))

    def _made(
        self, batch: list[Request], wants: Callable[[Request], bool]
    ) -> list[Picture | PromptFailed | None]:
        """What the device makes of each request; None of those that are of no use any more."""
        wanted = [wants(request) for request in batch]
        made = iter(self._generate(list(compress(batch, wanted))))
        return [next(made) if each else None for each in wanted]

    def _generate(self, batch: list[Request]) -> list[Picture | PromptFailed]:
        """The batch's pictures; that it is on the device is written down while the device works."""
        self._stop.check()
        if not batch:
            return []
        # Before warming, which works on the device as well, and may kill.
        on_device, before = list(dict.fromkeys(request.prompt.claim for request in batch)), self._on_device
        left = [claim for claim in before if claim not in on_device]
        marked, self._on_device = self._aside.submit(self._database.start, on_device, left), on_device
        if not before:  # what kills at once comes first in a run sooner or later: there it is blamed for sure
            marked.result()
        self._warm(batch)
        self._stop.check()
        self._parts.progress.batch(batch)
        started, spent = time.monotonic(), dict(self._engine.seconds)
        results = None
        try:
            with self._parts.watchdog.watch():
                results = self._engine.generate(batch, self._step)
        finally:
            took = {stage: seconds - spent.get(stage, 0.0) for stage, seconds in self._engine.seconds.items()}
            with suppress(Exception):  # a trace that fails must not fail a batch
                self._parts.traces.generated(batch, results, took, started)
        self._tally.batch(len(batch), started, ended := time.monotonic())
        self._sizes.generated(batch[0], len(batch), ended - started)
        marked.result()
        log.debug("generated a batch of %d", len(batch), extra={"event": "batch", "size": len(batch)})
        return results

    def _warm(self, batch: list[Request]) -> None:
        """Compile for the batch where that pays."""
        started, before = time.monotonic(), self._engine.seconds.get("compile", 0.0)
        self._engine.warm_up(batch, max(len(batch), self._left_to_make()))
        compiling = self._engine.seconds.get("compile", 0.0) - before
        self._tally.add_compile_time(compiling)
        if compiling:
            self._parts.traces.device("compile", started)

    def _step(self, done: int, of: int) -> None:
        self._parts.watchdog.heartbeat()
        self._stop.check()
        self._parts.progress.step(done, of)

    def _left_to_make(self) -> int:
        """How many pictures are still to come, as far as that can be known; in a loop, at the most."""
        if self._parts.serving is not None and self._parts.serving.endless:
            return UNBOUNDED_RUN
        rounds = self._plan.loop.iterations if self._plan.loop else 1
        return round(self._plan.to_make * self._quota.pictures_each() * rounds) - self._tally.made

    def _another_round(self) -> bool:
        """Wait until there is something to claim again; False where the run is over."""
        serving = self._parts.serving
        if serving is None:
            return self._retry_comes_due()
        with self._parts.seconds("wait"):
            waits = partial(self._database.waits, self._plan.selection)
            return serving.another(waits, self._tally.settled, self._quota.next_retry_at())

    def _retry_comes_due(self) -> bool:
        """Wait for the next of this run's own retries, if it comes soon enough to wait for."""
        now, due = self._clock(), self._quota.next_retry_at()
        if due is None or due > now + MAX_RETRY_WAIT:
            return False
        if due > now:
            log.info("waiting %.0f s for a prompt that is tried again", due - now)
        with self._parts.seconds("wait"):
            self._stop.wait(max(0.0, due - now))
        return True
