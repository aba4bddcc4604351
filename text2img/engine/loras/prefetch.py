"""Fetch the LoRAs of requests in background threads, before the requests join a batch.

The device then waits for a LoRA only if there is nothing else to generate. Requests with the same LoRAs
become ready together.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Self

from text2img.errors import PromptFailed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from text2img.engine.loras import LoraCache
    from text2img.prompts import Request
    from text2img.prompts.parameters import Lora

    Loras = tuple[Lora, ...]
    Ready = tuple[Request, PromptFailed | None]

_THREADS: Final = 8
_POLL_INTERVAL: Final = 0.5  # seconds between checks whether the run is stopped


class LoraPrefetcher:
    """A queue of requests that returns each of them with its LoRAs' files, or with its failure.

    Leaving the ``with`` block does not wait: unfinished downloads are abandoned.
    """

    def __init__(self, cache: LoraCache) -> None:
        self._cache = cache
        self._queued: queue.SimpleQueue[Loras | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[list[Ready] | BaseException] = queue.SimpleQueue()
        self._waiters: dict[Loras, list[Request]] = {}  # requests by the LoRAs they wait for
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.waiting = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for _ in self._threads:
            self._queued.put(None)

    def put(self, requests: Iterable[Request]) -> None:
        """Add requests."""
        for request in requests:
            self.waiting += 1
            loras = request.parameters.loras
            if not loras:
                self._results.put([(request, None)])
                continue
            self._start()
            with self._lock:
                waiters = self._waiters.setdefault(loras, [])
                waiters.append(request)
                if len(waiters) == 1:
                    self._queued.put(loras)

    def take(self, *, max_pending: int) -> list[Ready]:
        """Return the ready requests; wait until at most ``max_pending`` are still pending.

        Raises an error of a fetch that is not a prompt's failure, and what the cache's ``wait`` raises.
        """
        taken: list[Ready] = []
        while self.waiting:
            try:
                done = self._results.get(timeout=_POLL_INTERVAL if self.waiting > max_pending else 0)
            except queue.Empty:
                self._cache.wait(0)
                if self.waiting > max_pending:
                    continue
                break
            if isinstance(done, BaseException):
                raise done
            self.waiting -= len(done)
            taken += done
        return taken

    def _start(self) -> None:
        """Start the threads at the first request with a LoRA."""
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._work, name=f"lora-{number}", daemon=True)
                for number in range(_THREADS)
            ]
            for thread in self._threads:
                thread.start()

    def _work(self) -> None:
        while loras := self._queued.get():
            failed: PromptFailed | None = None
            files: tuple[str, ...] = ()
            try:
                for lora in loras:
                    files = (*files, self._cache.file(lora))
            except PromptFailed as exc:
                prefix = f"lora {len(files) + 1}: " if len(loras) > 1 else ""
                failed = PromptFailed(exc.code, f"{prefix}{exc}")
            except BaseException as exc:  # noqa: BLE001 - raised again in take()
                self._results.put(exc)
                continue
            with self._lock:
                waiters = self._waiters.pop(loras)
            self._results.put([(replace(request, lora_files=files), failed) for request in waiters])
