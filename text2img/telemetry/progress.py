"""How far a run is, shown to people by a bar on a terminal. Knows outcomes, not how they come about."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Protocol

from text2img.prompts import Completed, NeedsRefinement
from text2img.telemetry.stats import RunStats

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.progress import TaskID

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


class MultiProgress:
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


class NullProgress:
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
    """A bar on a terminal: prompts done, images a second, time left, failures, scores, steps in the batch.

    Once a prompt goes on to another iteration of its loop, each iteration has a bar of its own below.
    """

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[pace]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[notes]}{task.fields[steps]}"),
            console=console,
        )
        self._task = self._row("prompts", steps="loading the model")
        self._rounds: dict[int, TaskID] = {}
        self._ended: Counter[int] = Counter()  # prompts that have got through each iteration
        self._went_on: Counter[int] = Counter()  # those of them that were not good enough yet
        self._begun: float | None = None
        self._tally = RunStats()
        self._total: int | None = None

    def begin(self, total: int | None) -> None:
        """Show the bar."""
        self._total = total
        self._progress.update(self._task, total=total)
        self._progress.start()

    def batch(self, requests: Sequence[Request]) -> None:
        """Its first step will show it."""

    def step(self, done: int, of: int) -> None:
        """Show the steps of the batch that is on the device; the first one starts the clock."""
        self._begun = self._begun or time.monotonic()
        self._progress.update(self._task, steps=f"step {done}/{of}")

    def settled(self, outcomes: Sequence[Outcome]) -> None:
        """Move the bar on by what is final, and the iterations' bars by what has got through each."""
        self._tally.add(outcomes)
        for outcome in outcomes:
            if isinstance(outcome, Completed | NeedsRefinement):
                self._ended[outcome.iterations or 1] += 1
            if isinstance(outcome, NeedsRefinement):
                self._went_on[outcome.iterations] += 1
        pace = self._tally.pictures / (time.monotonic() - self._begun) if self._begun else 0.0
        self._progress.update(
            self._task,
            completed=self._tally.completed + self._tally.failed,
            pace=f"{pace:.2f} images/s" if pace else "",
            notes=self._notes(),
        )
        if self._tally.iterated:
            self._show_rounds()

    def end(self) -> None:
        """Leave the bar as it stands."""
        self._progress.update(self._task, steps="")
        self._progress.stop()

    def _row(self, name: str, *, steps: str = "") -> TaskID:
        return self._progress.add_task(name, total=None, pace="", notes="", steps=steps)

    def _notes(self) -> str:
        failed = f"[red]{self._tally.failed} failed[/] " if self._tally.failed else ""
        return failed + ("" if self._tally.score is None else f"score {self._tally.score:.2f} ")

    def _show_rounds(self) -> None:
        """Into each iteration but the first go the prompts that were not good enough after the one before."""
        for iteration in range(1, max(self._went_on) + 2):
            if iteration not in self._rounds:
                self._rounds[iteration] = self._row(f"iteration {iteration}")
            ended = self._ended[iteration]
            entered = self._total if iteration == 1 else max(self._went_on[iteration - 1], ended)
            self._progress.update(self._rounds[iteration], completed=ended, total=entered)
