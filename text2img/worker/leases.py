"""The leases of a worker's claims: renewed in the background, released when the worker ends."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Self

from text2img.concurrency.timeouts import run_with_timeout
from text2img.errors import DatabaseFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from text2img.databases import Queue, Selection
    from text2img.prompts import Claim, PromptId

log = logging.getLogger(__name__)

_JOIN_TIMEOUT = 2.0  # seconds that an extension under way may still take once the block is left
_MAX_LOSSES = 2
_RELEASE_TIMEOUT = 5.0  # seconds: an unavailable database must not hold up the end of the run


MAX_UNWRITABLE = 1_000
"""Documents that one run puts aside; where more reject what it writes, the cause is not theirs."""


class ExcludedPrompts:
    """The prompts that a run does not claim again. Safe to use from several threads.

    They are those whose documents cannot be written, and those that it gave back twice without having
    recorded anything: a third time would be no different.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unwritable: set[PromptId] = set()
        self._lost: Counter[PromptId] = Counter()

    def put_aside(self, prompt_id: PromptId, reason: str) -> bool:
        """Exclude a prompt whose document cannot be written; return False if it is excluded already.

        Raises DatabaseFailed, with the last reason, when there are more than 1,000.
        """
        with self._lock:
            if prompt_id in self._unwritable:
                return False
            self._unwritable.add(prompt_id)
            number = len(self._unwritable)
        if number > MAX_UNWRITABLE:
            raise DatabaseFailed(f"more than {MAX_UNWRITABLE:,} prompts fail in the same way: {reason}")
        return True

    def is_unwritable(self, prompt_id: PromptId) -> bool:
        """Return True if the prompt's document cannot be written."""
        with self._lock:
            return prompt_id in self._unwritable

    def lost(self, prompt_ids: Iterable[PromptId]) -> None:
        """Count prompts whose outcomes were not recorded, since their claims were lost."""
        with self._lock:
            self._lost.update(prompt_ids)

    def recorded(self, prompt_ids: Iterable[PromptId]) -> None:
        """Forget how often these were lost: something of them has been recorded."""
        with self._lock:
            for prompt_id in prompt_ids:
                self._lost.pop(prompt_id, None)

    def apply(self, selection: Selection) -> Selection:
        """Return the selection without the excluded prompts."""
        with self._lock:
            excluded = self._unwritable | self._given_back()
        return replace(selection, exclude=frozenset(excluded)) if excluded else selection

    def check(self) -> None:
        """Raise DatabaseFailed if a prompt was given back twice without anything recorded."""
        with self._lock:
            given_back = sorted(prompt_id.text for prompt_id in self._given_back())
        if given_back:
            raise DatabaseFailed(
                f"{len(given_back)} prompts were generated twice and could not be recorded, as their claims "
                f"were lost each time (the first is {given_back[0][:100]!r}); find out what else changes them"
            )

    def _given_back(self) -> set[PromptId]:
        return {prompt_id for prompt_id, times in self._lost.items() if times >= _MAX_LOSSES}


class Leases:
    """The claims that a worker holds, each with a lease of ``seconds``.

    A thread extends the leases every third of their duration, also while the device is busy. ``heartbeat`` is
    called just as often, to mark the run as alive. Leaving the ``with`` block releases what is still held at
    once; if the database is unavailable, it stops trying after a few seconds. ``lost`` counts claims that
    went to other workers. ``wait(event, seconds)`` waits for an event, and returns whether it is set.
    """

    def __init__(
        self,
        queue: Queue,
        seconds: float,
        heartbeat: Callable[[], None],
        *,
        wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
    ) -> None:
        self.seconds = seconds
        self._queue = queue
        self._heartbeat = heartbeat
        self._wait = wait
        self.lost = 0
        self._held: set[Claim] = set()
        self._on_device: set[Claim] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="leases", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        self._thread.join(_JOIN_TIMEOUT)
        self.release()

    def hold(self, claims: Iterable[Claim]) -> None:
        """Extend the leases of these claims from now on."""
        with self._lock:
            self._held.update(claims)

    def holds(self, claim: Claim) -> bool:
        """Return True if the claim is held as far as this worker knows; the database is authoritative."""
        with self._lock:
            return claim in self._held

    def forget(self, claims: Iterable[Claim]) -> None:
        """Stop extending the leases of claims that are done or lost."""
        with self._lock:
            self._held.difference_update(claims)

    def mark_lost(self, claims: Iterable[Claim]) -> None:
        """Drop claims that other workers now hold; those that were held count as ``lost``, once."""
        with self._lock:
            lost = self._held.intersection(claims)
            self._held -= lost
            self.lost += len(lost)

    def mark_on_device(self, claims: Iterable[Claim]) -> None:
        """Note which claims the device works on from now on."""
        with self._lock:
            self._on_device = set(claims)

    def release(self, *, stalled: bool = False) -> None:
        """Release all held claims. If the database is unavailable, the leases expire by themselves.

        ``stalled``: the device makes no more steps, which counts as a death of the claims on it.
        """
        with self._lock:
            claims = sorted(self._held, key=lambda claim: claim.id.name)
            blamed = [claim for claim in claims if stalled and claim in self._on_device]
            self._held.clear()
        if not claims:
            return
        try:
            run_with_timeout(_RELEASE_TIMEOUT, partial(self._release, claims, blamed))
            log.info("released %d claimed prompts", len(claims), extra={"released": len(claims)})
        except (DatabaseFailed, TimeoutError) as exc:
            log.warning(
                "%d prompts could not be released; their leases expire in %g s: %s",
                len(claims),
                self.seconds,
                exc,
            )

    def _release(self, claims: list[Claim], blamed: list[Claim]) -> None:
        if spared := [claim for claim in claims if claim not in blamed]:
            self._queue.release(spared)
        if blamed:
            self._queue.release_stalled(blamed)

    def _run(self) -> None:
        while not self._wait(self._closed, self.seconds / 3):
            with self._lock:
                claims = list(self._held)
            try:
                lost = self._queue.extend(claims, self.seconds) if claims else []
                if not self._closed.is_set():  # the run's end may be recorded by now
                    self._heartbeat()
            except Exception as exc:
                # Keep extending, whatever the error. If it persists, the worker meets it and fails the run.
                log.warning("the leases could not be extended: %s", exc, exc_info=exc)
                continue
            with self._lock:
                lost = [claim for claim in lost if claim in self._held]  # the others are done since
            if lost:
                self.mark_lost(lost)
                log.warning("%d claims were lost to other workers", len(lost), extra={"lost": len(lost)})
