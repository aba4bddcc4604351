"""Requests on their way to a batch: those whose LoRAs are here pass, the others wait until they are.

A few threads fetch ahead of the device, so that it need not wait for a LoRA while there is anything else to
draw. Those that wait for the same come together. Knows no batch and no place.
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
_LOOK: Final = 0.5  # seconds between looks whether the run is to end


class LoraPrefetcher:
    """Gives back each request that it was given, ready or with the reason why it never will be.

    Leaving the ``with`` block waits for nothing: what is being fetched is left behind.
    """

    def __init__(self, library: LoraCache) -> None:
        self._library = library
        self._asked: queue.SimpleQueue[Loras | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[list[Ready] | BaseException] = queue.SimpleQueue()
        self._alike: dict[Loras, list[Request]] = {}  # those that wait for the same
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.waiting = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for _ in self._threads:
            self._asked.put(None)

    def put(self, requests: Iterable[Request]) -> None:
        """Hand requests over."""
        for request in requests:
            self.waiting += 1
            loras = request.parameters.loras
            if not loras:
                self._done.put([(request, None)])
                continue
            self._start()
            with self._lock:
                alike = self._alike.setdefault(loras, [])
                alike.append(request)
                if len(alike) == 1:
                    self._asked.put(loras)

    def take(self, *, leave: int) -> list[Ready]:
        """Those that are ready; waits until no more than ``leave`` are still to come.

        Raises what ended a fetch but was no prompt's failure, and what the library's ``wait`` does.
        """
        taken: list[Ready] = []
        while self.waiting:
            try:
                done = self._done.get(timeout=_LOOK if self.waiting > leave else 0)
            except queue.Empty:
                self._library.wait(0)
                if self.waiting > leave:
                    continue
                break
            if isinstance(done, BaseException):
                raise done
            self.waiting -= len(done)
            taken += done
        return taken

    def _start(self) -> None:
        """Threads, once somebody asks for a LoRA."""
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._work, name=f"lora-{number}", daemon=True)
                for number in range(_THREADS)
            ]
            for thread in self._threads:
                thread.start()

    def _work(self) -> None:
        while loras := self._asked.get():
            failed: PromptFailed | None = None
            files: tuple[str, ...] = ()
            try:
                for lora in loras:
                    files = (*files, self._library.file(lora))
            except PromptFailed as exc:
                which = f"lora {len(files) + 1}: " if len(loras) > 1 else ""
                failed = PromptFailed(exc.code, f"{which}{exc}")
            except BaseException as exc:  # noqa: BLE001 - it is raised again where the requests are taken
                self._done.put(exc)
                continue
            with self._lock:
                alike = self._alike.pop(loras)
            self._done.put([(replace(request, lora_files=files), failed) for request in alike])
