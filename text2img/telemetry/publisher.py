"""Publishes a run's figures every so many seconds while it works, and once more when it is over."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Final, Protocol, Self

from text2img.concurrency.timeouts import within
from text2img.errors import DatabaseFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prometheus_client import CollectorRegistry

    from text2img.telemetry.backlog import Backlog
    from text2img.telemetry.metrics import Figures

log = logging.getLogger(__name__)

_A_TURN: Final = 5.0  # seconds for one look at the database, and for one place
_AT_THE_END: Final = 3.0  # seconds that all of it may take once the run is over
_IN_A_HURRY: Final = 0.8  # the same for a run that was stopped or has failed: its end has a bound of its own


class Place(Protocol):
    """Where figures go."""

    name: str

    def publish(self, registry: CollectorRegistry, seconds: float) -> None:
        """Put them there, within so many seconds; raises OSError."""
        ...


class Publishing:
    """Inside the ``with`` block a thread looks at the database and publishes, ``every`` so many seconds.

    Leaving it publishes the end. Nothing here raises, and nothing waits for what does not answer.
    """

    def __init__(
        self,
        figures: Figures,
        registry: CollectorRegistry,
        look: Callable[[], Backlog],
        places: Sequence[Place],
        every: float,
    ) -> None:
        self._figures, self._registry, self._look = figures, registry, look
        self._places, self._every = places, every
        self._over = threading.Event()
        self._silent: set[str] = set()
        self._turns = {place.name: threading.Lock() for place in places}
        self._thread = threading.Thread(target=self._keep, name="metrics", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._over.set()
        self._figures.succeeded, self._figures.ended_at = kind is None, time.time()
        seconds = _AT_THE_END if kind is None else _IN_A_HURRY
        try:
            within(seconds, lambda: self._end(seconds))
        except TimeoutError:
            log.warning("the metrics of the run's end could not be published within %g s", seconds)

    def _end(self, seconds: float) -> None:
        """Each place by itself: one that does not answer must not cost another its last figures."""
        self._look_again(seconds / 3)
        turns = [
            threading.Thread(target=self._publish, args=(place, seconds), daemon=True)
            for place in self._places
        ]
        for turn in turns:
            turn.start()
        for turn in turns:
            turn.join()

    def _keep(self) -> None:
        while True:
            self._look_again(_A_TURN)
            for place in self._places:
                if not self._over.is_set():
                    self._publish(place, _A_TURN)
            if self._over.wait(self._every):
                return

    def _look_again(self, seconds: float) -> None:
        try:
            self._figures.backlog = within(seconds, self._look)
        except (DatabaseFailed, TimeoutError) as exc:
            self._figures.backlog = None
            log.debug("what waits in the database is left out of the metrics: %s", exc)

    def _publish(self, place: Place, seconds: float) -> None:
        try:
            with self._turns[place.name]:  # else an older state could arrive after a newer one
                place.publish(self._registry, seconds)
        except Exception as exc:  # noqa: BLE001 - whatever a place does, the run is about pictures
            if place.name not in self._silent:
                log.warning("%s: the metrics could not be published: %s", place.name, exc)
            self._silent.add(place.name)
        else:
            self._silent.discard(place.name)
