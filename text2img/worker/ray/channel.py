"""The line between a run and one of its workers, at the worker's end. Knows no Ray, and not what is said."""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from text2img.concurrency.stages import Stop
from text2img.errors import RunFailed, Stopped, Text2ImgError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """The worker wants to claim so many more of the run's limit, and waits for ``Granted``."""

    wanted: int


@dataclass(frozen=True, slots=True)
class Idle:
    """The worker has found nothing to claim, and waits for ``GoOn``."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The worker has ended: ``failure`` is why, None where it was told to, or stopped."""

    failure: Text2ImgError | None = None


@dataclass(frozen=True, slots=True)
class Granted:
    """So many more may be claimed."""

    prompts: int


@dataclass(frozen=True, slots=True)
class GoOn:
    """There may be something to claim; not ``further``: there will not be."""

    further: bool = True


@dataclass(frozen=True, slots=True)
class End:
    """The run was asked to end by this signal."""

    signal: int


class Line:
    """What a worker says, in its order, and what it is told, from any thread. ``End`` sets ``stop``."""

    def __init__(self) -> None:
        self.stop = Stop()
        self._said: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._granted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._told: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._asking = threading.Lock()

    def say(self, event: object) -> None:
        """Let the run know; never waits."""
        self._said.put(event)

    def ask(self, wanted: int) -> int:
        """So many of the ``wanted`` prompts are granted. Raises Stopped when the run is asked to end."""
        with self._asking:
            self.say(Asked(wanted))
            granted = self._granted.get()
        self.stop.check()
        return granted

    def rest(self) -> bool:
        """Wait, idle, until told to go on; False: to end. Raises Stopped when the run is asked to end."""
        self.say(Idle())
        further = self._told.get()
        self.stop.check()
        return further

    def tell(self, word: Granted | GoOn | End) -> None:
        """The run tells the worker."""
        if isinstance(word, Granted):
            self._granted.put(word.prompts)
        elif isinstance(word, GoOn):
            self._told.put(word.further)
        else:
            self.stop.set(word.signal)
            self._granted.put(0)  # whoever waits shall see it
            self._told.put(False)

    def work(self, labour: Callable[[Line], None]) -> Iterator[object]:
        """Do the labour in a thread of its own; all that is said meanwhile, and ``Ended`` at the last."""
        threading.Thread(target=self._work, args=(labour,), name="labour", daemon=True).start()
        while not isinstance(event := self._said.get(), Ended):
            yield event
        yield event

    def _work(self, labour: Callable[[Line], None]) -> None:
        failure: Text2ImgError | None = None
        try:
            labour(self)
        except Stopped:
            pass  # who stopped it knows
        except Text2ImgError as exc:
            failure = exc
        except BaseException as exc:
            log.debug("the worker failed", exc_info=exc)
            first = (str(exc).splitlines() or [""])[0]
            failure = RunFailed(f"unexpected {type(exc).__name__}: {first}; --log-level DEBUG shows where")
        self.say(Ended(failure))
