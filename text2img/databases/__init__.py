"""The database: where prompts wait and results are kept. One Protocol; the URL's scheme picks the adapter.

Whoever uses it sees prompts, claims and outcomes, never a document or a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from text2img.databases.records import (
    Collections,
    CompletedPrompt,
    Counts,
    Failure,
    NewPrompt,
    Notification,
    PendingWebhook,
    Run,
    RunTotals,
    Selection,
    UndeliveredOutcome,
    WorkerClaims,
    webhook_id,
)
from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from text2img.errors import ErrorCode
    from text2img.prompts import Claim, ModelConfiguration, Outcome, Prompt

__all__ = [
    "Collections",
    "CompletedPrompt",
    "Counts",
    "Database",
    "Failure",
    "NewPrompt",
    "Notification",
    "Outbox",
    "PendingWebhook",
    "Queue",
    "Results",
    "Run",
    "RunStore",
    "RunTotals",
    "Selection",
    "UndeliveredOutcome",
    "WorkerClaims",
    "open_database",
    "webhook_id",
]


class Queue(Protocol):
    """Prompts, claimed by many workers at once, each by one at a time.

    A prompt is claimable when it is pending and its ``not_before`` has passed, or when its lease has run
    out. Every method raises DatabaseFailed when the database cannot be reached or refuses.
    """

    def claim(self, worker: str, limit: int, lease_seconds: float, selection: Selection) -> list[Prompt]:
        """At most ``limit`` claimable prompts, now this worker's: the highest priority first, then by id;
        pending ones before those whose lease ran out.

        Atomic for each prompt: of any number of workers exactly one gets it. Raises the prompt's claim
        number by one. A prompt whose worker died after ``start`` has one more death. Fewer than ``limit``
        says nothing of how many there are; an empty list says that there was none.
        """
        ...

    def peek(self, limit: int, selection: Selection) -> list[Prompt]:
        """What ``claim`` would give at this moment, left as it is: the claims in it are nobody's."""
        ...

    def start(self, claims: Sequence[Claim], left: Sequence[Claim] = ()) -> None:
        """Mark that these are on the device now: should the worker die, it counts as their death.

        Those that have ``left`` it, though nothing is recorded of them yet, count none from now on. May be
        repeated. A claim that is lost is passed over.
        """
        ...

    def extend(self, claims: Sequence[Claim], lease_seconds: float) -> list[Claim]:
        """Let the leases run ``lease_seconds`` from now; returns the claims that are lost.

        May be repeated.
        """
        ...

    def holds(self, claim: Claim) -> bool:
        """Whether the claim is still the prompt's latest and the prompt is in processing under it.

        True also when the lease has run out and nobody else has claimed the prompt.
        """
        ...

    def record(self, outcomes: Sequence[Outcome], run_id: str, *, tell: bool) -> list[Outcome]:
        """Write the outcomes down; returns those that were written, the rest had lost their claim.

        For a completed prompt: first its result is upserted (one for each prompt, never over a result with
        a greater claim number), then the prompt becomes completed. A failed prompt becomes ``error``, an
        iterated one pending with what its loop has come to, a postponed one pending with a ``not_before``.
        ``tell`` marks final outcomes as untold, and a prompt's ``webhook_url`` (which the worker has checked)
        marks its final outcome as owed. Each step is fenced by worker and claim number and may be repeated;
        a crash between two leaves a prompt that is claimed and done again.
        """
        ...

    def release(self, claims: Sequence[Claim]) -> None:
        """Give the prompts back: pending at once, with neither an attempt nor a death counted.

        May be repeated. A claim that is lost is passed over.
        """
        ...

    def release_dead(self, worker: str) -> int:
        """Let the leases of a worker that is known to be dead run out now; returns how many.

        They count as any other lease that ran out. May be repeated, and is safe should the worker live: it
        holds its claims until somebody takes them.
        """
        ...

    def waits(self, selection: Selection) -> bool:
        """Whether a prompt could be claimed at this moment: a look that costs little."""
        ...

    def pending(self, selection: Selection) -> int:
        """How many prompts could be claimed at this moment."""
        ...

    def postponed(self, selection: Selection) -> int:
        """How many pending prompts wait for their ``not_before``."""
        ...


class Outbox(Protocol):
    """Outcomes on their way to the callback's receiver, many in one notice, and to their prompts' own
    webhooks, each in a notice of its own; at least once each, also after a crash.
    """

    def collect(self, run_id: str, notice_id: str, limit: int) -> tuple[list[UndeliveredOutcome], bool]:
        """Mark at most ``limit`` untold outcomes of a run as that notice's; returns them, and whether more
        are left. Two that gather at once never mark the same outcome.
        """
        ...

    def save_notification(self, notification: Notification) -> None:
        """Keep the notice, unless one of its id is kept already, and count its outcomes as told."""
        ...

    def undelivered_runs(self) -> list[str]:
        """Ids of runs that are over or dead and have outcomes which no kept notice holds.

        A run is alive while its ``save_run`` with status ``running`` is younger than its lease. What a
        dead run had marked for a notice that was never kept is untold again.
        """
        ...

    def pending_webhooks(self, limit: int) -> list[PendingWebhook]:
        """At most ``limit`` outcomes that are owed to their prompts' webhooks, of whatever run.

        Nothing is marked: asked again, by whomever, they are the same, with the same ids.
        """
        ...

    def enqueue_webhooks(
        self, pending_webhooks: Sequence[PendingWebhook], notifications: Sequence[Notification]
    ) -> None:
        """Keep the notices, unless one of that id is kept already; then these are owed no more.

        May be repeated, and by several at once: a notice that is kept never changes.
        """
        ...

    def claim_notification(
        self, worker: str, lease_seconds: float, *, webhooks: bool = False, but: Collection[str] = ()
    ) -> Notification | None:
        """A kept notice that is due and that nobody sends at the moment, the oldest first; else None.

        One for the callback's receiver, or with ``webhooks`` one for a prompt's own, whose origin is none
        of ``but``. Raises its ``tries`` by one.
        """
        ...

    def complete_notification(self, notification: Notification, *, told: bool, detail: str) -> None:
        """The notice was told, or refused for good; ``detail`` says by what."""
        ...

    def reschedule_notification(self, notification: Notification, wait: float, detail: str) -> None:
        """Let the notice be due again in ``wait`` seconds; ``detail`` says why it could not be told."""
        ...

    def notifications(self, *, webhooks: bool = False) -> tuple[int, int]:
        """How many kept notices are still to be told, and how many were refused for good: those for the
        callback's receiver, or with ``webhooks`` those for prompts' own.
        """
        ...

    def undelivered(self, *, webhooks: bool = False) -> int:
        """How many final outcomes are in no kept notice yet: those to be told to the callback's receiver, or
        with ``webhooks`` those that are owed to prompts' own. A look at an index.
        """
        ...


class RunStore(Protocol):
    """What runs and their owners want to know and to say."""

    def model_configuration(self, config_id: str | None) -> ModelConfiguration | None:
        """The configuration of that id (matched as a Selection's), or the first of type
        ``stable_diffusion``; None where there is none.

        Raises ConfigurationError for a field that is unknown or out of range, and for an id that is not
        there.
        """
        ...

    def save_run(self, run: Run, lease_seconds: float) -> None:
        """Insert or replace the run's document; while it is ``running`` it counts as alive for the lease."""
        ...

    def last_runs(self, limit: int) -> list[Run]:
        """The latest runs, the newest first."""
        ...

    def run(self, run_id: str) -> Run | None:
        """The run of that id; None where there is none."""
        ...

    def settled(self, run_id: str) -> RunTotals:
        """What the run came to, by the prompts that say so now. One look at all of them."""
        ...

    def counts(self, selection: Selection) -> Counts:
        """How many prompts stand where."""
        ...

    def claims_by_worker(self, selection: Selection) -> list[WorkerClaims]:
        """What each worker holds: one entry for each that has prompts in processing, the dead as well.

        A prompt that another program has put in processing may be in the hands of ``unknown``.
        """
        ...

    def enqueue(self, prompts: Iterable[NewPrompt]) -> int:
        """Add those whose id is not there yet; returns how many that were. The others stay untouched."""
        ...

    def requeue_changed(self, prompts: Iterable[NewPrompt]) -> int:
        """Give those whose id is there, with other content, the content they have here, and put them back to
        pending as if new, to be made again; returns how many that were.

        What a worker holds at the moment stays as it is, and so does a prompt that says the same already.
        """
        ...

    def retry(self, code: ErrorCode | None, selection: Selection) -> int:
        """Put failed prompts (with that code, or all) back to pending, their attempts and deaths forgotten;
        returns how many.
        """
        ...


class Results(Protocol):
    """What was made and what failed, to be looked through: one document after another, by the index on their
    status, so that the memory it takes does not grow with them. Nothing is written.

    An iterator belongs to the thread that began it, and is over when the database is closed. It raises
    DatabaseFailed in the midst where the database goes away. What changes meanwhile may be seen or not.
    """

    def made(self, selection: Selection, run_id: str | None = None) -> Iterator[CompletedPrompt]:
        """The completed prompts of a selection, or those of them that this run completed, in no order that
        is promised.
        """
        ...

    def failures(self, selection: Selection, run_id: str | None = None) -> Iterator[Failure]:
        """The prompts that failed for good, in the same way."""
        ...


class Database(Queue, Outbox, RunStore, Results, Protocol):
    """All of it. Safe to use from several threads."""

    def open(self, *, create: bool = True) -> None:
        """Connect, and make the tables and indexes that the claim uses; without ``create`` write nothing.

        Raises DatabaseFailed within 20 seconds when that cannot be done. Opening again is harmless.
        """
        ...

    def close(self) -> None:
        """Let go of connections. May be repeated."""
        ...


def open_database(url: str, collections: Collections, *, create: bool = True) -> Database:
    """The adapter for a database URL, opened; without ``create`` nothing is written on the way.

    Raises ConfigurationError for a URL that cannot be read and DatabaseFailed where nobody answers.
    """
    scheme = url.partition(":")[0].lower()
    if scheme in {"mongodb", "mongodb+srv"}:
        from text2img.databases.mongo import MongoDatabase

        database: Database = MongoDatabase(url, collections)
    elif scheme == "sqlite":
        from text2img.databases.sqlite import SqliteDatabase

        database = SqliteDatabase(url, collections)
    else:
        raise ConfigurationError(
            "the database URL starts with none of mongodb://, mongodb+srv:// or sqlite:///; check --database"
        )
    try:
        database.open(create=create)
    except BaseException:
        database.close()
        raise
    return database
