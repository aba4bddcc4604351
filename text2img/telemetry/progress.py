"""The progress of a run: what the flow reports, the bar that shows it on a terminal, and its statistics."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Final, Protocol

from text2img.prompts import Completed, Failed, NeedsRefinement, RetryLater

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console
    from rich.progress import TaskID

    from text2img.errors import ErrorCode
    from text2img.prompts import Outcome, Request, StoredImage


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


_WIDE: Final = 105  # columns of a terminal that shows everything
_MEDIUM: Final = 60  # with a shorter bar
_NARROW: Final = 45  # without a bar


class Bar:
    """A bar on a terminal: prompts done, images a second, time left, failures, scores, steps in the batch.

    Once a prompt goes on to another iteration of its loop, each iteration gets its own bar below. A narrow
    terminal shows only the first of these.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        wide, width = console.width >= _WIDE, console.width
        columns = [
            *([TextColumn("{task.description}")] if width >= _NARROW else []),
            *([BarColumn(bar_width=30 if wide else 10)] if width >= _MEDIUM else []),
            MofNCompleteColumn(),
            *([TextColumn("{task.fields[pace]}")] if width >= _NARROW else []),
            TextColumn("{task.fields[left]}"),
            *([TextColumn("{task.fields[notes]}{task.fields[steps]}")] if width >= _MEDIUM else []),
        ]
        self._progress = Progress(*columns, console=console)
        self._task = self._row("prompts", steps="loading the model")
        self._iterations: dict[int, TaskID] = {}
        self._ended: Counter[int] = Counter()  # prompts that finished each iteration
        self._continued: Counter[int] = Counter()  # those of them that need another iteration
        self._clock = clock
        self._begun: float | None = None  # when the first batch went to the device
        self._last_record = 0.0
        self._in_first_batch = 0.0  # prompts, in proportion to the steps that are done
        self._batch_size = 0  # prompts of the batch on the device
        self._stats = RunStats()
        self._total: int | None = None

    def begin(self, total: int | None) -> None:
        """Show the bar."""
        self._total = total
        self._progress.update(self._task, total=total)
        self._progress.start()

    def batch(self, requests: Sequence[Request]) -> None:
        """Start the clock at the first batch, as the run's statistics do."""
        self._begun = self._begun or self._clock()
        self._batch_size = len({request.prompt.id for request in requests})

    def step(self, done: int, of: int) -> None:
        """Show the steps of the batch that is on the device, and the time left."""
        if not self._stats.recorded:
            self._in_first_batch = max(self._in_first_batch, self._batch_size * done / of)
        self._progress.update(self._task, steps=f"step {done}/{of}", left=self._time_left())

    def recorded(self, outcomes: Sequence[Outcome]) -> None:
        """Advance the bar by the final outcomes, and the iterations' bars by what finished each."""
        self._stats.add(outcomes)
        for outcome in outcomes:
            if isinstance(outcome, Completed | NeedsRefinement):
                self._ended[outcome.iterations or 1] += 1
            if isinstance(outcome, NeedsRefinement):
                self._continued[outcome.iterations] += 1
        self._last_record = self._clock()
        pace = self._stats.images / (self._last_record - self._begun) if self._begun else 0.0
        self._progress.update(
            self._task,
            completed=self._stats.completed + self._stats.failed,
            pace=f"{pace:.2f} images/s" if pace else "",
            left=self._time_left(),
            notes=self._notes(),
        )
        if self._stats.iterated:
            self._show_iterations()

    def end(self) -> None:
        """Stop the bar and leave it on the screen."""
        self._progress.update(self._task, steps="", left="")
        self._progress.stop()

    def _time_left(self) -> str:
        """Return the time left at the pace since the first batch began, as text; empty if it is unknown.

        Until a prompt is recorded, the steps of the first batch count.
        """
        if not self._total or self._begun is None:
            return ""
        done: float = self._stats.completed + self._stats.failed
        until = self._last_record if done else self._clock()
        done = done or self._in_first_batch
        if not done:
            return ""
        left = (self._total - done) * (until - self._begun) / done - (self._clock() - until)
        minutes, seconds = divmod(max(0, round(left)), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"

    def _row(self, name: str, *, steps: str = "") -> TaskID:
        return self._progress.add_task(name, total=None, pace="", left="", notes="", steps=steps)

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


DEVICE_STAGES: Final = ("load", "compile", "denoise", "decode", "wait")
"""Stages of the device's thread, in sequence. In ``wait`` it waits for a batch, or for the next stage."""
BACKGROUND_STAGES: Final = ("claim", "encode", "upload", "evaluate", "record")
"""Stages of background threads. Their times are summed over threads, and may exceed the run's duration."""


def _lacks_score(image: StoredImage) -> bool:
    """Return True if the image was to be scored, and has no score."""
    return image.evaluation is not None and image.evaluation.score is None


class RunStats:
    """Counters of recorded outcomes and generated batches; safe to use from several threads.

    ``completed`` and ``failed`` count final prompts, and ``failures`` the failed ones by error code.
    ``postponed`` counts each time that a prompt was requeued for a retry. ``iterated`` counts each time that
    a prompt went on to another iteration. ``images`` counts recorded images. ``made`` counts the images
    that the device generated in ``batches`` batches, for which it was ``busy`` seconds. ``devices`` is the
    number of devices; ``busy`` is summed over them. ``negatives_left_out`` counts the completed prompts whose
    negative prompt, the run's, would have had no effect.
    """

    def __init__(self) -> None:
        self.completed = 0
        self.images = 0
        self.failed = 0
        self.iterated = 0
        self.postponed = 0
        self.made = 0
        self.negatives_left_out = 0
        self._scored, self._scores = 0, 0.0
        self.unscored = 0
        self.devices = 1
        self.batches = 0
        self.busy = 0.0
        self.failures: Counter[ErrorCode] = Counter()
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        self._first: tuple[int, float, float] | None = None  # the first batch: its size, start and end
        self._last_end = 0.0
        self._last_record = 0.0
        self._compile_time = 0.0  # seconds since the first batch began

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Count recorded outcomes."""
        with self._lock:
            done = [outcome for outcome in outcomes if isinstance(outcome, Completed)]
            self.completed += len(done)
            self.negatives_left_out += sum(outcome.first.negative_left_out for outcome in done)
            scores = [outcome.first.score for outcome in done if outcome.first.score is not None]
            self._scored, self._scores = self._scored + len(scores), self._scores + sum(scores)
            self.unscored += sum(_lacks_score(image) for outcome in done for image in outcome.images)
            self.iterated += sum(isinstance(outcome, NeedsRefinement) for outcome in outcomes)
            self.images += sum(
                outcome.images_made
                for outcome in outcomes
                if isinstance(outcome, Completed | NeedsRefinement)
            )
            failed = [outcome.code for outcome in outcomes if isinstance(outcome, Failed)]
            self.failed += len(failed)
            self.failures.update(failed)
            self.postponed += sum(isinstance(outcome, RetryLater) for outcome in outcomes)
            self._last_record = time.monotonic()

    def batch(self, size: int, started: float, ended: float) -> None:
        """Count a batch of ``size`` images, generated between these moments (``time.monotonic``)."""
        with self._lock:
            self.made += size
            self.batches += 1
            self._first = self._first or (size, started, ended)
            self._last_end = ended
            self.busy += ended - started

    def set_totals(self, completed: int, failed: int, images: int) -> None:
        """Replace the counters with the database's totals.

        Workers that died may have recorded more than they reported.
        """
        with self._lock:
            self.completed, self.failed = completed, failed
            self.images = max(self.images, images)  # the database does not count the loops' tries

    def add_compile_time(self, seconds: float) -> None:
        """Add the seconds that the engine spent on compiling, to leave them out of the steady pace."""
        with self._lock:
            if self._first is not None:
                self._compile_time += seconds

    @property
    def score(self) -> float | None:
        """The mean score of the completed prompts' results; None where none has one."""
        with self._lock:
            return self._scores / self._scored if self._scored else None

    @property
    def recorded(self) -> int:
        """The number of outcomes recorded, of every kind."""
        with self._lock:
            return self.completed + self.failed + self.postponed + self.iterated

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._begun

    @property
    def images_per_second(self) -> float:
        """Recorded images a second, from the first batch's start to the last record."""
        return 0.0 if self._first is None else _share(self.images, self._last_record - self._first[1])

    @property
    def steady_images_per_second(self) -> float:
        """Images a second between the first and the last batch's end, without compiling; 0 for one batch."""
        if self._first is None:
            return 0.0
        size, _, ended = self._first
        return _share(self.made - size, self._last_end - ended - self._compile_time)

    @property
    def device_busy(self) -> float:
        """The share of the time in which the device worked on a batch, in [0, 1].

        The time runs from the first batch's start to the last one's end, without compiling.
        """
        if self._first is None:
            return 0.0
        whole = self._last_end - self._first[1] - self._compile_time
        return min(1.0, _share(self.busy, whole * self.devices))

    @property
    def device_busy_of_run(self) -> float:
        """The share of the whole run, with loading, in which the device worked on a batch, in [0, 1]."""
        return min(1.0, _share(self.busy, self.seconds * self.devices))


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
