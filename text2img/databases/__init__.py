"""The database, which holds the queue of prompts and the results; the URL's scheme selects the adapter.

The Protocols exchange prompts, claims and outcomes, never documents or rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    StoredPrompt,
    UndeliveredOutcome,
    WorkerClaims,
    is_webhook_id,
    webhook_id,
)
from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence

    from text2img.errors import ErrorCode
    from text2img.prompts import Claim, ModelConfiguration, Outcome, Prompt, PromptId

__all__ = [
    "Collections",
    "CompletedPrompt",
    "Connection",
    "Counts",
    "Database",
    "Failure",
    "NewPrompt",
    "Notification",
    "Outbox",
    "PendingWebhook",
    "PutAside",
    "Queue",
    "Results",
    "Run",
    "RunStore",
    "RunTotals",
    "Selection",
    "StoredPrompt",
    "UndeliveredOutcome",
    "WorkerClaims",
    "is_webhook_id",
    "open_database",
    "webhook_id",
]


PutAside = Callable[["Prompt", str], None]
"""Called with a prompt whose document cannot be written, and the reason. It may raise to end the call."""


class Queue(Protocol):
    """The queue of prompts, shared by many workers; only one worker at a time has a valid claim on a prompt.

    A prompt is claimable when it is pending and its ``not_before`` has passed, or when its lease has
    expired. Every method raises DatabaseFailed when the database is unreachable or rejects the call.
    """

    def claim(
        self,
        worker: str,
        limit: int,
        lease_seconds: float,
        selection: Selection,
        put_aside: PutAside | None = None,
    ) -> list[Prompt]:
        """Claim at most ``limit`` prompts for the worker.

        Pending prompts come before those whose lease expired; within each, higher priority first, then by id.

        Atomic for each prompt: of any number of workers exactly one gets it. Increments the prompt's claim
        number. If the prompt's previous worker died after ``start``, its deaths are incremented. The result
        may be shorter than ``limit`` although more are claimable; it is empty only if none was claimable.

        ``put_aside`` gets the prompts whose documents reject the claim (the owner's schema, for example);
        these stay as they are. Without it, the first of them raises DatabaseFailed.
        """
        ...

    def peek(self, limit: int, selection: Selection) -> list[Prompt]:
        """Return what ``claim`` would return now, without claiming: the claims in it are not valid."""
        ...

    def start(self, claims: Sequence[Claim], left: Sequence[Claim] = ()) -> None:
        """Mark the claims as running on the device: if the worker dies, it counts as their death.

        Unmark the claims that have ``left`` the device before their outcome is recorded. May be repeated.
        Lost claims are ignored.
        """
        ...

    def extend(self, claims: Sequence[Claim], lease_seconds: float) -> list[Claim]:
        """Renew the leases for ``lease_seconds`` from now; return the claims that are lost.

        May be repeated.
        """
        ...

    def holds(self, claim: Claim) -> bool:
        """Return True if the claim is still the prompt's latest and the prompt is in processing under it.

        Also True if the lease has expired and no other worker has claimed the prompt.
        """
        ...

    def record(
        self,
        outcomes: Sequence[Outcome],
        run_id: str,
        *,
        notify: bool,
        put_aside: PutAside | None = None,
    ) -> list[Outcome]:
        """Record the outcomes; return those that were written. The others had lost their claim.

        Completed: the result is upserted first (one for each prompt, never over a result with a greater
        claim number), then the prompt becomes ``completed``. Failed: the prompt becomes ``error``. Needs
        refinement: it becomes pending, with the state of its loop. Retry later: it becomes pending, with a
        ``not_before``.

        ``notify`` marks final outcomes as undelivered. A ``webhook_url`` on the prompt, already checked by
        the worker, marks its final outcome for a webhook.

        A result or a prompt that cannot be written is recorded as failed, as ``invalid_document``; if that
        cannot be written either, ``put_aside`` gets the prompt, and its claim is released if possible.
        Raises DatabaseFailed if a unique index that is not this job's rejects results.

        Each step is fenced by worker and claim number and may be repeated. After a crash between two steps
        the prompt is still claimed, and is processed again.
        """
        ...

    def release(self, claims: Sequence[Claim]) -> None:
        """Requeue the prompts: pending at once, without counting an attempt or a death.

        May be repeated. Lost claims are ignored.
        """
        ...

    def release_stalled(self, claims: Sequence[Claim]) -> None:
        """Requeue the prompts that stalled the device: pending at once, with one death more.

        May be repeated. Lost claims are ignored.
        """
        ...

    def release_dead(self, worker: str) -> int:
        """Expire the leases of a worker that is known to be dead; return how many there were.

        They count as any other expired lease. May be repeated. Safe if the worker is in fact alive: it keeps
        its claims until another worker takes them.
        """
        ...

    def check_results(self) -> None:
        """Try to write results, under ids of their own, and remove them again.

        Raises DatabaseFailed, with the reason, if they are rejected.
        """
        ...

    def check_claim(self, selection: Selection) -> None:
        """Try a claim on a copy of the next prompt, which no worker can claim, and remove it again.

        Raises DatabaseFailed, with the reason, if it is rejected. Does nothing if no prompt is claimable.
        """
        ...

    def has_claimable(self, selection: Selection) -> bool:
        """Return True if a prompt is claimable now. A cheap query."""
        ...

    def pending(self, selection: Selection) -> int:
        """Count the prompts that are claimable now."""
        ...

    def postponed(self, selection: Selection) -> int:
        """Count the pending prompts whose ``not_before`` has not passed."""
        ...


class Outbox(Protocol):
    """Outcomes to deliver: to the callback's receiver in batches, to prompts' own webhooks one by one.

    Each is delivered at least once, also after a crash.
    """

    def collect(
        self, run_id: str, notification_id: str, limit: int, max_bytes: int | None = None
    ) -> tuple[list[UndeliveredOutcome], bool]:
        """Assign at most ``limit`` undelivered outcomes of a run to the notification.

        With ``max_bytes``, the sum of their sizes is bounded too; one outcome may exceed it alone. Return
        them, and True if more are left. Concurrent calls never assign the same outcome. An outcome that
        cannot be read is returned without what cannot be.
        """
        ...

    def save_notification(self, notification: Notification) -> None:
        """Save the notification, unless its id is saved already, and mark its outcomes as delivered."""
        ...

    def undelivered_runs(self) -> list[str]:
        """Return the ids of finished or dead runs with outcomes that are in no saved notification.

        A run is alive while its ``save_run`` with status ``running`` is younger than its lease. Outcomes that
        a dead run had assigned to a notification that it never saved become undelivered again.
        """
        ...

    def pending_webhooks(self, limit: int) -> list[PendingWebhook]:
        """Return at most ``limit`` outcomes, of any run, that await their prompts' webhooks.

        Fewer if they are large, but at least one if there is one. Changes nothing: repeated calls return the
        same outcomes with the same ids, to every worker.
        """
        ...

    def repeat_webhooks(self, ids: Sequence[PromptId]) -> int:
        """Make the notifications for these prompts' own webhooks due again, with the same ids and bodies.

        Return how many. Prompts that are not finished are ignored, and so are those whose notification is
        still to be sent. Of an outcome without a notification one is made, as if it had just been recorded.
        """
        ...

    def repeat_notification(self, notification: Notification) -> None:
        """Save the notification; if its id is saved already, make that one due again."""
        ...

    def enqueue_webhooks(
        self, pending_webhooks: Sequence[PendingWebhook], notifications: Sequence[Notification]
    ) -> None:
        """Save the notifications, unless their ids are saved; then the webhooks are no longer pending.

        May be repeated, also concurrently: a saved notification never changes.
        """
        ...

    def claim_notification(
        self,
        worker: str,
        lease_seconds: float,
        *,
        webhooks: bool = False,
        exclude_origins: Collection[str] = (),
    ) -> Notification | None:
        """Claim the oldest saved notification that is due and that no worker is sending; None without one.

        It is one for the callback's receiver or, with ``webhooks``, one for a prompt's own webhook whose
        origin is not in ``exclude_origins``. Increments its ``tries``.
        """
        ...

    def complete_notification(self, notification: Notification, *, delivered: bool, detail: str) -> None:
        """Close the notification as delivered or as permanently rejected; ``detail`` is the response."""
        ...

    def replace_notification(
        self, notification: Notification, parts: Sequence[Notification], detail: str
    ) -> None:
        """Replace the notification by its parts in one step; ``detail`` is the reason.

        The parts are due at once, at its place in the order. Does nothing if it is closed. May be repeated,
        also after a crash at any point: the same parts are never saved twice. The notification is kept,
        without its body, and is never due again.
        """
        ...

    def reopen_notifications(self) -> int:
        """Make all permanently rejected notifications due again, of both kinds; return how many."""
        ...

    def reschedule_notification(self, notification: Notification, wait: float, detail: str) -> None:
        """Make the notification due again in ``wait`` seconds; ``detail`` is the reason."""
        ...

    def notifications(self, *, webhooks: bool = False) -> tuple[int, int]:
        """Count the saved notifications that are still to be delivered, and those permanently rejected.

        Those for the callback's receiver or, with ``webhooks``, those for prompts' own webhooks.
        """
        ...

    def undelivered(self, *, webhooks: bool = False) -> int:
        """Count the final outcomes that are in no saved notification yet. Served by an index.

        Those for the callback's receiver or, with ``webhooks``, those for prompts' own webhooks.
        """
        ...


class RunStore(Protocol):
    """Runs, counts, model configurations, and what owners do with their prompts."""

    def model_configuration(self, config_id: str | None) -> ModelConfiguration | None:
        """Return the configuration with that id (matched like a Selection's).

        Without an id, return the first of type ``stable_diffusion``, or None if there is none. Raises
        ConfigurationError for a field that is unknown or out of range, and for an unknown id.
        """
        ...

    def begin_run(self, run: Run, lease_seconds: float, replaces: str | None = None) -> bool:
        """Save a run that begins, as ``save_run`` does; return False if another live run has its id.

        A run is alive while its status is ``running`` and its lease has not expired. Atomic. ``replaces``, if
        given, is the name of a worker that is known to be dead, whose lease does not count.
        """
        ...

    def save_run(self, run: Run, lease_seconds: float) -> None:
        """Insert or replace the run's document; while it is ``running`` it counts as alive for the lease."""
        ...

    def last_runs(self, limit: int) -> list[Run]:
        """Return the latest runs, the newest first."""
        ...

    def run(self, run_id: str) -> Run | None:
        """Return the run with that id; None if there is none."""
        ...

    def run_totals(self, run_id: str) -> RunTotals:
        """Return the run's totals, computed by one query from the prompts that carry its id now."""
        ...

    def counts(self, selection: Selection) -> Counts:
        """Count the prompts by status."""
        ...

    def claims_by_worker(self, selection: Selection) -> list[WorkerClaims]:
        """Return each worker's claims: one entry for each worker, dead or alive, with prompts in processing.

        The worker is ``unknown`` if another program put a prompt in processing without a name.
        """
        ...

    def enqueue(
        self, prompts: Iterable[NewPrompt], input_file: str | None = None, *, restore: bool = True
    ) -> int:
        """Add the prompts whose id is new or ``removed``; return how many were added.

        They remember the input file, an absolute path. The others stay untouched; without an input file they
        forget theirs, so that they stay when they leave it. Without ``restore`` every known prompt stays
        as it is, also a removed one.

        Raises PromptFailed (``invalid_document``) for a prompt that the database rejects for what it holds,
        such as by the owner's schema. Those that were to be added with it may be missing: call it again.
        """
        ...

    def stored(self, ids: Sequence[PromptId]) -> dict[PromptId, NewPrompt | None]:
        """Return the content of those prompts that exist, as their owners wrote it; None: unreadable."""
        ...

    def requeue_changed(self, prompts: Iterable[NewPrompt]) -> int:
        """Update the known prompts whose content differs and requeue them as if new; return how many.

        A prompt that a worker holds stays as it is, and so does one whose content is the same already.
        """
        ...

    def compare(self, prompts: Sequence[NewPrompt], selection: Selection) -> list[StoredPrompt | None]:
        """Return what is stored under each prompt's id; None if nothing is. Writes nothing."""
        ...

    def left_file(
        self, input_file: str, kept: Container[PromptId], selection: Selection | None = None
    ) -> list[PromptId]:
        """Return the pending prompts that came from the input file and are not among those kept.

        With a selection, only those of it that are claimable now.
        """
        ...

    def remove(self, prompt_ids: Sequence[PromptId], input_file: str) -> int:
        """Change those prompts of the input file that are pending to ``removed``; return how many.

        May be repeated.
        """
        ...

    def save_scores(
        self, prompt: CompletedPrompt, scores: Sequence[float | None], evaluation: Mapping[str, object]
    ) -> bool:
        """Replace the scores of a completed prompt and its result, and the evaluation of the first image.

        Return False if the prompt has another first image by now.
        """
        ...

    def retry(self, code: ErrorCode | None, selection: Selection) -> int:
        """Requeue failed prompts (with that code, or all), attempts and deaths reset; return how many."""
        ...


class Results(Protocol):
    """Completed and failed prompts, read one by one through the index on their status; nothing is written.

    Memory use does not grow with their number. An iterator belongs to the thread that started it, and ends
    when the database is closed. It raises DatabaseFailed if the database becomes unavailable while it is
    read. Changes made while it is read may or may not be seen.
    """

    def completed(self, selection: Selection, run_id: str | None = None) -> Iterator[CompletedPrompt]:
        """Iterate over the selection's completed prompts (of the run, if given), in no particular order."""
        ...

    def failures(self, selection: Selection, run_id: str | None = None) -> Iterator[Failure]:
        """Iterate over the selection's failed prompts (of the run, if given), in no particular order."""
        ...


class Connection(Protocol):
    """The connection that the parts of a database share."""

    def open(self, *, create: bool = True) -> None:
        """Connect, and create the tables and indexes that are missing; without ``create`` write nothing.

        Raises DatabaseFailed within 20 seconds when that fails. May be repeated.
        """
        ...

    def close(self) -> None:
        """Close the connections. May be repeated."""
        ...


@dataclass(frozen=True, slots=True)
class Database:
    """A database: its four parts and the connection that they share. Safe to use from several threads."""

    connection: Connection
    queue: Queue
    outbox: Outbox
    runs: RunStore
    results: Results

    def close(self) -> None:
        """Close the connections. May be repeated."""
        self.connection.close()


def open_database(url: str, collections: Collections, *, create: bool = True) -> Database:
    """Return the adapter for a database URL, opened; without ``create`` nothing is written.

    Raises ConfigurationError for an invalid URL and DatabaseFailed for an unreachable database.
    """
    scheme = url.partition(":")[0].lower()
    if scheme in {"mongodb", "mongodb+srv"}:
        database = _mongo(url, collections)
    elif scheme == "sqlite":
        database = _sqlite(url, collections)
    else:
        raise ConfigurationError(
            "the database URL must start with mongodb://, mongodb+srv:// or sqlite:///; check --database"
        )
    try:
        database.connection.open(create=create)
    except BaseException:
        database.close()
        raise
    return database


def _mongo(url: str, collections: Collections) -> Database:
    from text2img.databases.mongo.outbox import MongoOutbox
    from text2img.databases.mongo.queue import MongoQueue
    from text2img.databases.mongo.run_store import MongoResults, MongoRunStore
    from text2img.databases.mongo.session import Session

    session = Session(url, collections)
    return Database(
        connection=session,
        queue=MongoQueue(session),
        outbox=MongoOutbox(session),
        runs=MongoRunStore(session),
        results=MongoResults(session),
    )


def _sqlite(url: str, collections: Collections) -> Database:
    from text2img.databases.sqlite.outbox import SqliteOutbox
    from text2img.databases.sqlite.queue import SqliteQueue
    from text2img.databases.sqlite.run_store import SqliteResults, SqliteRunStore
    from text2img.databases.sqlite.session import Session

    session = Session(url, collections)
    return Database(
        connection=session,
        queue=SqliteQueue(session),
        outbox=SqliteOutbox(session),
        runs=SqliteRunStore(session),
        results=SqliteResults(session),
    )
