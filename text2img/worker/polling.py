"""How a server takes work: it polls until it was idle for too long, and checks messages for known ids."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Final, Protocol, Self

from text2img.errors import PromptFailed
from text2img.intake.entries import sender_of
from text2img.webhooks.delivery import save_rejection

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Sequence

    from text2img.concurrency.signals import Stop
    from text2img.databases import Database, NewPrompt
    from text2img.prompts.ids import HostAllowlist


log = logging.getLogger(__name__)

_INITIAL_PAUSE = 1.0  # seconds between the first polls
_PAUSE_GROWTH = 1.5
_STOP_POLL_INTERVAL = 0.1  # seconds in which a signal is noticed


class Intake(Protocol):
    """A source of prompts besides the database, such as a broker, with its own threads."""

    def start(self) -> None:
        """Start to take in prompts. Raises RunFailed if that is impossible."""
        ...

    def check(self) -> None:
        """Raise the error that ended the intake, if there was one."""
        ...

    def close(self) -> None:
        """Stop within seconds. A message that is half taken in is delivered again. May be repeated."""
        ...


class WorkSource(Protocol):
    """Decides whether a worker goes on when nothing is left to claim.

    The work is done inside its ``with`` block.
    """

    @property
    def long_running(self) -> bool:
        """True if prompts may keep coming, so that long-term optimisations pay off."""
        ...

    def wait_for_work(self, has_work: Callable[[], bool], recorded: int, next_retry_at: float | None) -> bool:
        """Wait until there may be something to claim; return False if the worker has to end.

        ``has_work()`` is True if something can be claimed; ``recorded`` is the number of outcomes so far;
        ``next_retry_at`` is when a requeued prompt can be claimed again (``time.monotonic``), if any.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


class PollingLoop:
    """A server's waits between its rounds; see WorkSource. Its intake, if any, runs in the ``with`` block.

    ``idle_exit``: seconds after which an idle server ends; None: never. ``poll_seconds``: the maximum time
    between polls. ``arrived`` is set when new work arrives, and ends a wait at once. ``clock`` counts the
    seconds.
    """

    def __init__(  # noqa: PLR0913 - the clock is one of them
        self,
        stop: Stop,
        arrived: threading.Event,
        *,
        poll_seconds: float,
        idle_exit: float | None = None,
        intake: Intake | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stop, self._arrived, self._intake = stop, arrived, intake
        self._poll_seconds = poll_seconds
        self._clock = clock
        self._idle_exit = math.inf if idle_exit is None else idle_exit
        self.long_running = True
        self._recorded = -1
        self._idle_since = 0.0

    def __enter__(self) -> Self:
        if self._intake is not None:
            self._intake.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._intake is not None:
            self._intake.close()

    def wait_for_work(self, has_work: Callable[[], bool], recorded: int, next_retry_at: float | None) -> bool:
        """Wait until ``has_work()``; return False once the server has been idle for ``idle_exit``.

        See WorkSource. Raises Stopped when asked to end, and the error that ended the intake.
        """
        pause = min(_INITIAL_PAUSE, self._poll_seconds)
        if recorded != self._recorded:
            self._recorded, self._idle_since = recorded, self._clock()
            log.debug("idle", extra={"event": "idle"})
        else:  # another worker claimed it first
            self._sleep(pause)
        while True:
            self._arrived.clear()
            self._check()
            if has_work():
                return True
            now = self._clock()
            left = self._idle_since + self._idle_exit - now
            if left <= 0:
                log.info("idle for %g s; exiting", self._idle_exit, extra={"event": "idle_exit"})
                return False
            until_retry = math.inf if next_retry_at is None or next_retry_at <= now else next_retry_at - now
            self._sleep(min(pause, left, until_retry))
            pause = min(pause * _PAUSE_GROWTH, self._poll_seconds)

    def _sleep(self, seconds: float) -> None:
        """Wait until something arrives, for at most ``seconds``."""
        deadline = self._clock() + seconds
        while (left := deadline - self._clock()) > 0 and not self._arrived.wait(
            min(left, _STOP_POLL_INTERVAL)
        ):
            self._check()

    def _check(self) -> None:
        self._stop.check()
        if self._intake is not None:
            self._intake.check()


_DIFFERS: Final = (
    "generation_id is that of a prompt that the database holds, and this message differs from it; use a new"
    " generation_id"
)


class Admission:
    """Adds the prompts of messages to the database, for the intake's thread.

    ``hosts`` may be notified. ``arrived`` is called when there are new prompts, ``notify`` when there are
    notifications to send. Each method may be called again with the same messages; both raise DatabaseFailed.
    """

    def __init__(
        self,
        database: Database,
        hosts: HostAllowlist,
        *,
        arrived: Callable[[], None],
        notify: Callable[[], None],
    ) -> None:
        self._database, self._hosts = database, hosts
        self._arrived, self._notify = arrived, notify

    def add(self, prompts: Sequence[NewPrompt]) -> dict[int, str]:
        """Add the new prompts, and send the outcomes of repeated messages' prompts again.

        Return the reasons to reject messages, by their position: they differ from the prompt that exists.
        """
        added = self._database.runs.enqueue(prompts, restore=False)
        if added:
            self._arrived()
        if added == len(prompts):
            return {}
        stored = self._database.runs.stored([prompt.id for prompt in prompts])
        differing = {
            position: _DIFFERS
            for position, prompt in enumerate(prompts)
            if stored.get(prompt.id, prompt) != prompt
        }
        same = [prompt for position, prompt in enumerate(prompts) if position not in differing]
        repeated = [prompt.id for prompt in same if self._is_allowed(prompt.webhook_url)]
        if repeated and self._database.outbox.repeat_webhooks(repeated):
            self._notify()
        duplicates = len(prompts) - added
        log.info("%d of %d messages are for prompts that already exist", duplicates, len(prompts))
        return differing

    def reject(self, body: bytes, reasons: Sequence[str]) -> None:
        """Notify a dead letter's sender, if the id is new and the host is allowed."""
        sender = sender_of(body)
        if sender is None or not self._is_allowed(sender.webhook_url):
            return
        if self._database.runs.stored([sender.id]):
            return
        outbox = self._database.outbox
        save_rejection(outbox, sender.id, sender.webhook_url, sender.code, "; ".join(reasons))
        self._notify()

    def _is_allowed(self, webhook_url: str | None) -> bool:
        if webhook_url is None:
            return False
        try:
            self._hosts.check(webhook_url)
        except PromptFailed:
            return False
        return True
