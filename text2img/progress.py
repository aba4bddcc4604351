"""How far a run is, shown to people by a bar on a terminal. Knows outcomes, not how they come about."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from text2img.prompts import Completed, Failed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from text2img.prompts import Outcome, Request


class Progress(Protocol):
    """Told of what happens, from several threads."""

    def begin(self, total: int | None) -> None:
        """A run begins, the model first; about ``total`` prompts wait, or there is no end to them."""
        ...

    def batch(self, requests: Sequence[Request]) -> None:
        """This batch goes on the device now."""
        ...

    def step(self, done: int, of: int) -> None:
        """The batch on the device has made ``done`` of its steps."""
        ...

    def settled(self, outcomes: Sequence[Outcome]) -> None:
        """These outcomes are recorded."""
        ...

    def end(self) -> None:
        """The work is over, well or not. May be repeated."""
        ...


class Several:
    """Hands on to several, in their order."""

    def __init__(self, *several: Progress) -> None:
        self._several = several

    def begin(self, total: int | None) -> None:
        """To each."""
        for each in self._several:
            each.begin(total)

    def batch(self, requests: Sequence[Request]) -> None:
        """To each."""
        for each in self._several:
            each.batch(requests)

    def step(self, done: int, of: int) -> None:
        """To each."""
        for each in self._several:
            each.step(done, of)

    def settled(self, outcomes: Sequence[Outcome]) -> None:
        """To each."""
        for each in self._several:
            each.settled(outcomes)

    def end(self) -> None:
        """To each."""
        for each in self._several:
            each.end()


class Silent:
    """No bar: the log lines say it all."""

    def begin(self, total: int | None) -> None:
        """Say nothing."""

    def batch(self, requests: Sequence[Request]) -> None:
        """Say nothing."""

    def step(self, done: int, of: int) -> None:
        """Say nothing."""

    def settled(self, outcomes: Sequence[Outcome]) -> None:
        """Say nothing."""

    def end(self) -> None:
        """Say nothing."""


class Bar:
    """A bar on a terminal: prompts done, images a second, time left, failures, steps within the batch."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("prompts"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failures]}{task.fields[steps]}"),
            console=console,
        )
        self._task = self._progress.add_task(
            "prompts", total=None, pace="", failures="", steps="loading the model"
        )
        self._begun: float | None = None
        self._completed = 0
        self._pictures = 0
        self._failed = 0

    def begin(self, total: int | None) -> None:
        """Show the bar."""
        self._progress.update(self._task, total=total)
        self._progress.start()

    def batch(self, requests: Sequence[Request]) -> None:
        """Its first step will show it."""

    def step(self, done: int, of: int) -> None:
        """Show the steps of the batch that is on the device; the first one starts the clock."""
        self._begun = self._begun or time.monotonic()
        self._progress.update(self._task, steps=f"step {done}/{of}")

    def settled(self, outcomes: Sequence[Outcome]) -> None:
        """Move the bar on by what is final."""
        done = [outcome for outcome in outcomes if isinstance(outcome, Completed)]
        self._completed += len(done)
        self._pictures += sum(len(outcome.pictures) for outcome in done)
        self._failed += sum(isinstance(outcome, Failed) for outcome in outcomes)
        pace = self._pictures / (time.monotonic() - self._begun) if self._begun else 0.0
        self._progress.update(
            self._task,
            completed=self._completed + self._failed,
            pace=f"{pace:.2f} images/s" if pace else "",
            failures=f"[red]{self._failed} failed[/] " if self._failed else "",
        )

    def end(self) -> None:
        """Leave the bar as it stands."""
        self._progress.update(self._task, steps="")
        self._progress.stop()
