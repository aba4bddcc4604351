"""The progress of a run: what the flow reports, and the bar that shows it on a terminal."""

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
    """A receiver of a run's events; called from several threads."""

    def begin(self, total: int | None) -> None:
        """Begin a run, which loads the model first; about ``total`` prompts wait, None for an endless run."""
        ...

    def batch(self, requests: Sequence[Request]) -> None:
        """Report that this batch goes to the device now."""
        ...

    def step(self, done: int, of: int) -> None:
        """Report that the batch on the device has done ``done`` of its steps."""
        ...

    def recorded(self, outcomes: Sequence[Outcome]) -> None:
        """Report that these outcomes are recorded."""
        ...

    def end(self) -> None:
        """Report that the work is over, successful or not. May be called again."""
        ...


class MultiProgress:
    """Progress that forwards every event to several others, in their order."""

    def __init__(self, *receivers: Progress) -> None:
        self._receivers = receivers

    def begin(self, total: int | None) -> None:
        """Forward the event."""
        for receiver in self._receivers:
            receiver.begin(total)

    def batch(self, requests: Sequence[Request]) -> None:
        """Forward the event."""
        for receiver in self._receivers:
            receiver.batch(requests)

    def step(self, done: int, of: int) -> None:
        """Forward the event."""
        for receiver in self._receivers:
            receiver.step(done, of)

    def recorded(self, outcomes: Sequence[Outcome]) -> None:
        """Forward the event."""
        for receiver in self._receivers:
            receiver.recorded(outcomes)

    def end(self) -> None:
        """Forward the event."""
        for receiver in self._receivers:
            receiver.end()


class NullProgress:
    """Progress that shows nothing: the log lines suffice."""

    def begin(self, total: int | None) -> None:
        """Do nothing."""

    def batch(self, requests: Sequence[Request]) -> None:
        """Do nothing."""

    def step(self, done: int, of: int) -> None:
        """Do nothing."""

    def recorded(self, outcomes: Sequence[Outcome]) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""


class Bar:
    """A bar on a terminal: prompts done, images a second, time left, failures, scores, steps in the batch.

    Once a prompt goes on to another iteration of its loop, each iteration gets its own bar below.
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
        self._iterations: dict[int, TaskID] = {}
        self._ended: Counter[int] = Counter()  # prompts that finished each iteration
        self._continued: Counter[int] = Counter()  # those of them that need another iteration
        self._begun: float | None = None
        self._stats = RunStats()
        self._total: int | None = None

    def begin(self, total: int | None) -> None:
        """Show the bar."""
        self._total = total
        self._progress.update(self._task, total=total)
        self._progress.start()

    def batch(self, requests: Sequence[Request]) -> None:
        """Do nothing: the batch's first step will show it."""

    def step(self, done: int, of: int) -> None:
        """Show the steps of the batch that is on the device; the first one starts the clock."""
        self._begun = self._begun or time.monotonic()
        self._progress.update(self._task, steps=f"step {done}/{of}")

    def recorded(self, outcomes: Sequence[Outcome]) -> None:
        """Advance the bar by the final outcomes, and the iterations' bars by what finished each."""
        self._stats.add(outcomes)
        for outcome in outcomes:
            if isinstance(outcome, Completed | NeedsRefinement):
                self._ended[outcome.iterations or 1] += 1
            if isinstance(outcome, NeedsRefinement):
                self._continued[outcome.iterations] += 1
        pace = self._stats.images / (time.monotonic() - self._begun) if self._begun else 0.0
        self._progress.update(
            self._task,
            completed=self._stats.completed + self._stats.failed,
            pace=f"{pace:.2f} images/s" if pace else "",
            notes=self._notes(),
        )
        if self._stats.iterated:
            self._show_iterations()

    def end(self) -> None:
        """Stop the bar and leave it on the screen."""
        self._progress.update(self._task, steps="")
        self._progress.stop()

    def _row(self, name: str, *, steps: str = "") -> TaskID:
        return self._progress.add_task(name, total=None, pace="", notes="", steps=steps)

    def _notes(self) -> str:
        failed = f"[red]{self._stats.failed} failed[/] " if self._stats.failed else ""
        return failed + ("" if self._stats.score is None else f"score {self._stats.score:.2f} ")

    def _show_iterations(self) -> None:
        """Update each iteration's bar; prompts enter an iteration when they need one after the last."""
        for iteration in range(1, max(self._continued) + 2):
            if iteration not in self._iterations:
                self._iterations[iteration] = self._row(f"iteration {iteration}")
            ended = self._ended[iteration]
            entered = self._total if iteration == 1 else max(self._continued[iteration - 1], ended)
            self._progress.update(self._iterations[iteration], completed=ended, total=entered)
