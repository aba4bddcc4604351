"""Requests on their way to a batch: those whose LoRAs are here pass, the others wait until they are.

A few threads fetch ahead of the device, so that it need not wait for a LoRA while there is anything else to
draw. Knows no batch and no place.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Self

from text2img.errors import PromptFailed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from text2img.loras import Library
    from text2img.prompts import Request

    Ready = tuple[Request, PromptFailed | None]

_THREADS: Final = 8
_LOOK: Final = 0.5  # seconds between looks whether the run is to end


class Fetching:
    """Gives back each request that it was given, ready or with the reason why it never will be.

    Leaving the ``with`` block waits for nothing: what is being fetched is left behind.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._asked: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Ready | BaseException] = queue.SimpleQueue()
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
            if request.parameters.loras:
                self._start()
                self._asked.put(request)
            else:
                self._done.put((request, None))

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
            self.waiting -= 1
            taken.append(done)
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
        while request := self._asked.get():
            try:
                files = tuple(self._library.file(lora) for lora in request.parameters.loras)
                self._done.put((replace(request, lora_files=files), None))
            except PromptFailed as exc:
                self._done.put((request, exc))
            except BaseException as exc:  # noqa: BLE001 - it is raised again where the requests are taken
                self._done.put(exc)
