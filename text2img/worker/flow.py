"""The flow of a worker: claim → generate, and hand over to ``finish`` (encode → store → record → notify).

The thread that calls ``Worker.run`` owns the device. At the same time one thread claims and groups the next
prompts, up to eight fetch their LoRAs, one marks in the database which prompts are on the device, two take
the batches that are generated (a pool of upload workers encodes, uploads and scores their images), and two
record outcomes. The leases, the watchdog and the dispatchers of notifications have threads of their own.
The worker knows the engine, the queue, the storage and the evaluator by their Protocols only.
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
from text2img.engine.loras.cache import LoraPrefetcher
from text2img.errors import PromptFailed
from text2img.prompts import failure, request
from text2img.prompts.batching import Batcher, ClaimBudget, FastestSize, FixedSize
from text2img.worker.finish import PostProcessor
from text2img.worker.scoring import stored_image_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from text2img.databases import Selection
    from text2img.engine import Engine, GeneratedImage, ModelInfo
    from text2img.prompts import Claim, Outcome, Prompt, Request, RequestedParameters, StoredImage
    from text2img.worker.build import Dependencies, RunContext

    Images = Sequence[GeneratedImage | StoredImage | PromptFailed | None]

log = logging.getLogger(__name__)

MAX_RETRY_WAIT = 30.0
"""Seconds that a run waits for one of its own retries; those due later are left to a later run."""
CLAIM_DOUBLE_THRESHOLD = 8
"""While the run has this many batches of prompts left, two batches are claimed at once: fewer commands. With
fewer left it is one, so that other workers get a share of the last prompts. What other workers have claimed
is not known here: with many of them the last one may still find nothing."""
UNBOUNDED_RUN = 1_000_000
"""Images that a server is assumed to have left: enough for compiling to pay off."""
MAX_PREFETCH_BATCHES = 6
"""While more batches of prompts than this wait for their LoRAs, no more are claimed."""
OUTCOME_FLUSH_DELAY = 5.0
"""Seconds that the outcomes of a small batch wait for those of the next, to be recorded in one command.

At most half of the stall timeout: a batch that stalls the device must not cost the one before it.
"""


class Worker:
    """Works through the pending prompts of one selection, in rounds: each ends when nothing is left to claim.

    A run has one round, and more for its own retries and for prompts that a loop refines; a server waits
    between rounds until it is idle for too long. ``requested`` are the run's own parameters, the most
    specific first; ``clock`` measures when a retry is due.
    """

    def __init__(  # noqa: PLR0913 - two contexts, and the model in three parts
        self,
        deps: Dependencies,
        run: RunContext,
        engine: Engine,
        model_info: ModelInfo,
        requested: Sequence[RequestedParameters],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deps, self._run, self._engine, self._model_info = deps, run, engine, model_info
        self._requested, self._clock = requested, clock
        self._sizes = (FastestSize if deps.fastest_size else FixedSize)(deps.batch_size)
        self._budget = ClaimBudget(deps.limit, run.waiting, run.more, clock=clock)
        self._post = PostProcessor(deps, run, model_info, self._budget)
        self._flush_delay = min(OUTCOME_FLUSH_DELAY, run.watchdog.stall_timeout / 2)
        self._loaded: Future[None] = Future()
        self._on_device: list[Claim] = []
        self._warned = False
        self._unscored: list[Request] = []  # their images are stored, and wait for a score

    def run(self) -> None:
        """Run round after round. The model is loaded while the first prompts are claimed.

        Raises RunFailed when a part has failed, and Stopped when the run was asked to end. In both cases
        finished images are stored and recorded first, as far as the failed part allows, and the remaining
        claims are released.
        """
        # The leases are entered first and left last: they are extended until everything is recorded.
        try:
            with self._run.leases, self._post, ThreadPoolExecutor(1, "mark") as self._marker:
                self._run.database.queue.check_results()  # before an image is made that could not be recorded
                self._run_round()
                while self._wait_for_more():
                    self._run_round()
        finally:
            self._warn_of_syntax()
        self._run.excluded.check()

    def _warn_of_syntax(self) -> None:
        """Log once that prompts have other programs' syntax: at a run's end, or after a server's round."""
        if not self._warned and (warning := self._deps.syntax.warning):
            self._warned = True
            log.warning("%s", warning)

    def _run_round(self) -> None:
        """Claim, generate and finish until nothing is left to claim. Each step works ahead of the next."""
        post = self._post
        # The last stage is entered first and left last. Leaving ends the claiming, then finishes the batches
        # that are generated, then records their outcomes.
        with (
            WriteBuffer(  # record and notify, in one call for as many outcomes as a batch usually has
                post.record_and_notify, threads=2, batch_size=self._usual_size, max_delay=self._flush_delay
            ) as outcomes,
            Stage("finish", partial(post.encode_and_store, outcomes.put), threads=2, capacity=1) as finish,
            BatchPrefetcher(self._claim_batches(outcomes), capacity=1) as claimed,
        ):
            self._load()
            for batch in self._run.seconds.iterate("wait", claimed):
                images = self._generate(batch)
                with self._run.seconds("wait"):
                    finish.put((batch, images))
        if self._run.serving is not None:
            self._warn_of_syntax()

    def _load(self) -> None:
        """Load the model, once. The thread that prepares prompts gets the result, or the error."""
        if self._loaded.done():
            return
        started = time.monotonic()
        try:
            self._engine.load()
            self._run.traces.device("load", started)
            if self._deps.evaluator is not None:
                self._deps.evaluator.load()
        except BaseException as exc:
            self._loaded.set_exception(exc)
            raise
        name = self._model_info.name
        log.info("loaded %s", name, extra={"event": "loaded", "model": name})
        self._loaded.set_result(None)

    # Claiming, in the prefetcher's thread

    def _claim_batches(self, outcomes: WriteBuffer[Outcome]) -> Iterator[list[Request]]:
        """Yield the batches for the device: claim, prepare, fetch LoRAs and group, until nothing is left."""
        batcher = Batcher(self._sizes)
        with LoraPrefetcher(self._deps.loras) as fetching:
            while claimed := self._claim():
                ready, failed = self._prepare(claimed)
                outcomes.put(failed)
                fetching.put(ready)
                # Take what is fetched by now, without waiting.
                batcher.add(self._with_loras(fetching, outcomes, allow_pending=fetching.waiting))
                capacity = MAX_PREFETCH_BATCHES * self._sizes.usual
                yield from self._take_unscored()
                # While too many requests wait for LoRAs, no more is claimed: smaller batches go ahead then.
                while batcher.ready() or (len(batcher) and fetching.waiting > capacity):
                    yield batcher.take()
                # Claim again only when no more than that wait for LoRAs.
                batcher.add(self._with_loras(fetching, outcomes, allow_pending=capacity))
            yield from self._take_unscored()
            while len(batcher) or fetching.waiting:  # wait for a LoRA only when nothing else is left
                pending = fetching.waiting - (0 if len(batcher) else 1)
                batcher.add(self._with_loras(fetching, outcomes, allow_pending=pending))
                yield from self._take_unscored()
                if batch := batcher.take():
                    yield batch

    def _claim(self) -> list[Prompt]:
        """Claim the prompts of one or two batches; none when nothing is left or the limit is reached."""
        run, size = self._run, max(1, round(self._sizes.usual / self._budget.images_per_prompt()))
        run.stop.check()
        many = self._budget.remaining() >= CLAIM_DOUBLE_THRESHOLD * size
        wanted = self._budget.take(2 * size if many else size)
        if wanted == 0:
            return []
        with run.seconds("claim"):
            prompts = run.database.queue.claim(
                run.worker, wanted, run.leases.seconds, self._selection(), self._post.put_aside
            )
        run.leases.hold(prompt.claim for prompt in prompts)
        self._budget.claimed(len(prompts))
        return prompts

    def _selection(self) -> Selection:
        """Return the run's selection, without the prompts that it does not claim again."""
        return self._run.excluded.apply(self._deps.selection)

    def _prepare(self, prompts: Sequence[Prompt]) -> tuple[list[Request], list[Outcome]]:
        """Wait for the model; return the requests of the prompts, and the failures of invalid ones."""
        self._loaded.result()
        deps = self._deps
        ready: list[Request] = []
        failed: list[Outcome] = []
        for claimed in prompts:
            prompt = replace(claimed, webhook_url=None)  # no webhook is notified before its URL is checked
            try:
                if claimed.webhook_url is not None:
                    prompt = replace(claimed, webhook_url=deps.webhook_hosts.check(claimed.webhook_url))
                wanted = request(prompt, self._requested, self._model_info.multiple, deps.limits)
                deps.syntax.check(prompt.id, wanted.text, prompt.requested.negative_prompt)
                wanted = deps.loop.next(wanted) if deps.loop else wanted
                deps.encoder.check(wanted.parameters)
                ready.append(self._engine.prepare(wanted))
            except PromptFailed as exc:
                failed.append(failure(prompt, exc, deps.max_attempts))
        self._budget.prepared(len(ready), sum(each.num_images for each in ready))
        return ready, failed

    def _with_loras(
        self, fetching: LoraPrefetcher, outcomes: WriteBuffer[Outcome], *, allow_pending: int
    ) -> list[Request]:
        """Return the requests whose LoRAs have been fetched, one for each image; record those that failed.

        Waits until no more than ``allow_pending`` requests are left waiting for their LoRAs.
        """
        fetched = fetching.take(max_pending=allow_pending)
        failed = [(each.prompt, exc) for each, exc in fetched if exc]
        outcomes.put([failure(prompt, exc, self._deps.max_attempts) for prompt, exc in failed])
        images = [image for each, exc in fetched if exc is None for image in each.per_image()]
        found = [(image, stored_image_of(image, self._model_info)) for image in images]
        self._unscored += [replace(image, stored=stored) for image, stored in found if stored is not None]
        return [image for image, stored in found if stored is None]

    def _take_unscored(self) -> Iterator[list[Request]]:
        """Yield the requests that only need a score, in batches that the device does not see."""
        while self._unscored:
            taken = self._unscored[: self._sizes.usual]
            self._unscored = self._unscored[self._sizes.usual :]
            yield taken

    # Generating, in the thread that owns the device

    def _generate(self, batch: list[Request]) -> Images:
        """Return an image or a failure for each request; None where the image is no longer needed."""
        if batch[0].stored is not None:  # nothing to generate
            return [request.stored for request in batch]
        needed = [self._post.is_needed(request) for request in batch]
        images = iter(self._generate_needed(list(compress(batch, needed))))
        return [next(images) if each else None for each in needed]

    def _generate_needed(self, batch: list[Request]) -> list[GeneratedImage | PromptFailed]:
        run, engine = self._run, self._engine
        run.stop.check()
        if not batch:
            return []
        marked = self._mark_started(batch)
        self._warm_up(batch)
        run.stop.check()
        run.progress.batch(batch)
        started, before = time.monotonic(), dict(engine.seconds)
        images = None
        try:
            with run.watchdog.watch():
                images = engine.generate(batch, self._on_step)
        finally:
            spent = {stage: seconds - before.get(stage, 0.0) for stage, seconds in engine.seconds.items()}
            with suppress(Exception):  # a trace that fails must not fail a batch
                run.traces.generated(batch, images, spent, started)
        run.stats.batch(len(batch), started, ended := time.monotonic())
        self._sizes.generated(batch[0], len(batch), ended - started)
        marked.result()
        log.debug("generated a batch of %d", len(batch), extra={"event": "batch", "size": len(batch)})
        return images

    def _mark_started(self, batch: list[Request]) -> Future[None]:
        """Mark in the database which prompts are on the device: if this worker dies, they count a death more.

        A prompt stays marked until its outcome is recorded, its claim is released, or a batch without it
        starts: ``left`` are the prompts of the batch before that are not in this one. The mark is set before
        warming up, which uses the device as well, and while the device works. The first batch of a run starts
        after it, and so does each suspect that runs alone: a prompt that kills at once is then sure to be
        blamed, and the batch before it is not.
        """
        claims, before = list(dict.fromkeys(request.prompt.claim for request in batch)), self._on_device
        left = [claim for claim in before if claim not in claims]
        marked, self._on_device = self._marker.submit(self._run.database.queue.start, claims, left), claims
        self._run.leases.mark_on_device(claims)
        if not before or batch[0].alone:
            marked.result()
        return marked

    def _warm_up(self, batch: list[Request]) -> None:
        """Compile for the batch where that pays."""
        started, before = time.monotonic(), self._engine.seconds.get("compile", 0.0)
        self._engine.warm_up(batch, max(len(batch), self._images_left()))
        compiling = self._engine.seconds.get("compile", 0.0) - before
        self._run.stats.add_compile_time(compiling)
        if compiling:
            self._run.traces.device("compile", started)

    def _on_step(self, done: int, of: int) -> None:
        self._run.watchdog.heartbeat()
        self._run.stop.check()
        self._run.progress.step(done, of)

    def _images_left(self) -> int:
        """Return how many images are still to be made, as far as is known; in a loop, the maximum."""
        serving, loop = self._run.serving, self._deps.loop
        if serving is not None and serving.long_running:
            return UNBOUNDED_RUN
        rounds = loop.iterations if loop else 1
        prompts = self._run.will_make(self._deps.limit)
        return round(prompts * self._budget.images_per_prompt() * rounds) - self._run.stats.made

    # Between rounds

    def _wait_for_more(self) -> bool:
        """Wait until there is something to claim again; return False when the run is over."""
        serving = self._run.serving
        if serving is None:
            return self._wait_for_retry()
        with self._run.seconds("wait"):
            has_work = partial(self._run.database.queue.has_claimable, self._selection())
            return serving.wait_for_work(has_work, self._run.stats.recorded, self._budget.next_retry_at())

    def _wait_for_retry(self) -> bool:
        """Wait for the next of this run's own retries; return False where none is due soon enough."""
        now, due = self._clock(), self._budget.next_retry_at()
        if due is None or due > now + MAX_RETRY_WAIT:
            return False
        if due > now:
            log.info("waiting %.0f s for a retry", due - now)
        with self._run.seconds("wait"):
            self._run.stop.wait(max(0.0, due - now))
        return True

    def _usual_size(self) -> int:
        return self._sizes.usual
