"""The outbox in SQLite: marks on prompts, and notifications in ``callbacks``; implements Outbox.

A final outcome's ``untold`` is 1 at first, then the id of the notification it is assigned to; it is NULL
once that is saved. Its ``webhook_untold`` is the id of the notification for the prompt's own webhook, until
that is saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from text2img.databases import Notification, PendingWebhook, is_webhook_id, webhook_id
from text2img.databases.documents import MAX_BYTES, WEBHOOK_ID, WEBHOOK_PENDING, count_of, undelivered_of
from text2img.databases.sqlite.session import id_of, names_of, object_of, structure_of, timestamp
from text2img.prompts.quoting import plain_text

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Iterable, Sequence

    from text2img.databases import UndeliveredOutcome
    from text2img.databases.sqlite.session import Session
    from text2img.prompts import PromptId

_UNDELIVERED: Final = (
    "SELECT * FROM {datasets} WHERE untold = 1 AND run_id = :run "
    "LIMIT max(0, :limit - (SELECT count(*) FROM {datasets} WHERE untold = :notification))"
)
_MARK: Final = "UPDATE {datasets} SET untold = :notification WHERE _id = {id} AND untold = 1"
_UNMARK: Final = (
    "UPDATE {datasets} SET untold = 1 WHERE untold IS NOT NULL AND run_id NOT IN "
    "(SELECT _id FROM {runs} WHERE status = 'running' AND lease_expires_at > :now)"
)
_UNDELIVERED_RUNS: Final = (
    "SELECT DISTINCT run_id FROM {datasets} WHERE untold IS NOT NULL AND run_id NOT IN "
    "(SELECT _id FROM {runs} WHERE status = 'running' AND lease_expires_at > :now) ORDER BY run_id"
)
_DUE: Final = (
    "SELECT * FROM {callbacks} WHERE state = 'due' AND {receiver} "
    "AND (not_before IS NULL OR not_before <= :now) "
    "AND (lease_expires_at IS NULL OR lease_expires_at <= :now) ORDER BY created_at, _id LIMIT 1"
)
_SAVE: Final = (
    "INSERT INTO {callbacks} (_id, run_id, body, tries, state, created_at, url, origin) "
    "VALUES (?, ?, ?, ?, 'due', ?, ?, ?) ON CONFLICT (_id) DO NOTHING"
)
_REOPEN: Final = (
    "UPDATE {callbacks} SET state = 'due', closed_at = NULL, not_before = NULL WHERE _id = {id} "
    "AND state IN ('told', 'refused')"
)
_REPEATABLE: Final = (
    "SELECT webhook_message_id FROM {datasets} WHERE _id = {id} AND webhook_untold IS NULL "
    "AND status IN ('completed', 'error')"
)
_MARK_WEBHOOK: Final = (
    "UPDATE {datasets} SET webhook_untold = :notification, webhook_message_id = :notification "
    "WHERE _id = {id}"
)
_CLAIM: Final = (
    "UPDATE {callbacks} SET tries = :tries, claimed_by = :worker, lease_expires_at = :until WHERE _id = {id}"
)
_CLOSE: Final = (
    "UPDATE {callbacks} SET state = :state, detail = :detail, closed_at = :now, claimed_by = NULL, "
    "lease_expires_at = NULL, not_before = NULL{more} WHERE _id = {id} AND state = 'due'"
)


class SqliteOutbox:
    """The Outbox part of the database, documented by the Protocol."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def collect(
        self, run_id: str, notification_id: str, limit: int, max_bytes: int | None = None
    ) -> tuple[list[UndeliveredOutcome], bool]:
        """See Outbox.collect. Outcomes assigned by an earlier call stay assigned."""
        values = {"notification": notification_id, "run": run_id, "limit": limit}
        with self._session.writing() as connection:
            undelivered = connection.execute(self._session.sql(_UNDELIVERED), values)
            found = [names_of(prompt_id) for prompt_id in _first(undelivered, max_bytes)]
            marks = [{"notification": notification_id, **names} for names in found]
            connection.executemany(self._session.sql(_MARK), marks)
            marked = self._session.sql("SELECT * FROM {datasets} WHERE untold = :notification ORDER BY _id")
            rows = connection.execute(marked, values).fetchall()
            left = self._session.sql("SELECT 1 FROM {datasets} WHERE untold = 1 AND run_id = :run LIMIT 1")
            more = connection.execute(left, values).fetchone() is not None
        return [_outcome(row) for row in rows], more

    def save_notification(self, notification: Notification) -> None:
        """See Outbox.save_notification. One transaction."""
        with self._session.writing() as connection:
            self._save(connection, [notification])
            unmark = self._session.sql("UPDATE {datasets} SET untold = NULL WHERE untold = ?")
            connection.execute(unmark, (notification.id,))

    def undelivered_runs(self) -> list[str]:
        """See Outbox.undelivered_runs."""
        now = {"now": timestamp()}
        with self._session.writing() as connection:
            # A notification is saved and its marks removed together: any mark left is a dead run's.
            connection.execute(self._session.sql(_UNMARK), now)
            runs = [row[0] for row in connection.execute(self._session.sql(_UNDELIVERED_RUNS), now)]
        # Runs of other types are not the job's, nor are those with ids that are not UTF-8.
        return [run for run in runs if isinstance(run, str) and run == plain_text(run)]

    def pending_webhooks(self, limit: int) -> list[PendingWebhook]:
        """See Outbox.pending_webhooks."""
        statement = self._session.sql(
            "SELECT * FROM {datasets} WHERE webhook_untold IS NOT NULL AND typeof(webhook_untold) = 'text' "
            "LIMIT ?"
        )
        with self._session.reading() as connection:
            pending: list[PendingWebhook] = []
            left = MAX_BYTES
            for row in connection.execute(statement, (limit,)):
                outcome = _outcome(row)
                left -= outcome.size
                if pending and left < 0:
                    break
                pending.append(
                    PendingWebhook(
                        notification_id=row["webhook_untold"],
                        run_id=str(row["run_id"]),
                        webhook_url=row["webhook_url"],
                        outcome=outcome,
                    )
                )
        return pending

    def repeat_webhooks(self, ids: Sequence[PromptId]) -> int:
        """See Outbox.repeat_webhooks. One transaction."""
        repeatable, mark, reopen, known = map(
            self._session.sql,
            (_REPEATABLE, _MARK_WEBHOOK, _REOPEN, "SELECT 1 FROM {callbacks} WHERE _id = {id}"),
        )
        repeated = 0
        with self._session.writing() as connection:
            for prompt_id in ids:
                prompt = names_of(prompt_id)
                row = connection.execute(repeatable, prompt).fetchone()
                if row is None:
                    continue
                kept = row[WEBHOOK_ID]
                name = kept if is_webhook_id(kept) else webhook_id()
                if connection.execute(known, _names(name)).fetchone():
                    repeated += connection.execute(reopen, _names(name)).rowcount
                else:
                    repeated += connection.execute(mark, {**prompt, "notification": name}).rowcount
        return repeated

    def repeat_notification(self, notification: Notification) -> None:
        """See Outbox.repeat_notification. One transaction."""
        with self._session.writing() as connection:
            self._save(connection, [notification])
            connection.execute(self._session.sql(_REOPEN), _names(notification.id))

    def enqueue_webhooks(
        self, pending_webhooks: Sequence[PendingWebhook], notifications: Sequence[Notification]
    ) -> None:
        """See Outbox.enqueue_webhooks. One transaction."""
        statement = self._session.sql(
            "UPDATE {datasets} SET webhook_untold = NULL WHERE webhook_untold = {id}"
        )
        with self._session.writing() as connection:
            self._save(connection, notifications)
            connection.executemany(statement, [_names(item.notification_id) for item in pending_webhooks])

    def claim_notification(
        self,
        worker: str,
        lease_seconds: float,
        *,
        webhooks: bool = False,
        exclude_origins: Collection[str] = (),
    ) -> Notification | None:
        """See Outbox.claim_notification."""
        excluded = {f"excluded_{index}": origin for index, origin in enumerate(exclude_origins)}
        webhook = f"origin IS NOT NULL AND origin NOT IN ({', '.join(f':{name}' for name in excluded)})"
        statement = self._session.sql(_DUE, receiver=webhook if webhooks else "origin IS NULL")
        with self._session.writing() as connection:
            row = connection.execute(statement, {"now": timestamp(), **excluded}).fetchone()
            if row is None:
                return None
            tries = count_of(row["tries"]) + 1
            claim = {"tries": tries, "worker": worker, "until": timestamp(lease_seconds)}
            connection.execute(self._session.sql(_CLAIM), {**claim, **_names(row["_id"])})
        body = row["body"] if isinstance(row["body"], str) else ""
        fields = {name: row[name] for name in ("run_id", "url", "origin")}
        return Notification(id=row["_id"], tries=tries, body=body, **fields)

    def complete_notification(self, notification: Notification, *, delivered: bool, detail: str) -> None:
        """See Outbox.complete_notification. A closed notification stays as it is."""
        closed = {"state": "told" if delivered else "refused", "detail": detail, "now": timestamp()}
        with self._session.writing() as connection:
            connection.execute(self._session.sql(_CLOSE, more=""), {**closed, **_names(notification.id)})

    def replace_notification(
        self, notification: Notification, parts: Sequence[Notification], detail: str
    ) -> None:
        """See Outbox.replace_notification. One transaction."""
        replaced = {"state": "replaced", "detail": detail, "now": timestamp(), **_names(notification.id)}
        created = self._session.sql("SELECT created_at FROM {callbacks} WHERE _id = {id}")
        with self._session.writing() as connection:
            closing = self._session.sql(_CLOSE, more=", body = NULL")
            if connection.execute(closing, replaced).rowcount:
                # At the place of the whole: what comes last in a run's notifications still comes last.
                (created_at,) = connection.execute(created, _names(notification.id)).fetchone()
                self._save(connection, parts, created_at)

    def reopen_notifications(self) -> int:
        """See Outbox.reopen_notifications."""
        statement = self._session.sql(
            "UPDATE {callbacks} SET state = 'due', closed_at = NULL, not_before = NULL "
            "WHERE state = 'refused'"
        )
        with self._session.writing() as connection:
            return connection.execute(statement).rowcount

    def reschedule_notification(self, notification: Notification, wait: float, detail: str) -> None:
        """See Outbox.reschedule_notification. Does nothing if another worker has claimed it since."""
        statement = self._session.sql(
            "UPDATE {callbacks} SET not_before = :until, detail = :detail, claimed_by = NULL, "
            "lease_expires_at = NULL WHERE _id = {id} AND state = 'due' AND tries = :tries"
        )
        values = {"until": timestamp(wait), "detail": detail, "tries": notification.tries}
        with self._session.writing() as connection:
            connection.execute(statement, {**values, **_names(notification.id)})

    def notifications(self, *, webhooks: bool = False) -> tuple[int, int]:
        """See Outbox.notifications."""
        statement = self._session.sql(
            "SELECT state, count(*) FROM {callbacks} WHERE state IN ('due', 'refused') AND origin {receiver} "
            "GROUP BY state",
            receiver="IS NOT NULL" if webhooks else "IS NULL",
        )
        with self._session.reading() as connection:
            by_state = dict(tuple(row) for row in connection.execute(statement))
        return by_state.get("due", 0), by_state.get("refused", 0)

    def undelivered(self, *, webhooks: bool = False) -> int:
        """See Outbox.undelivered."""
        mark = WEBHOOK_PENDING if webhooks else "untold"
        statement = self._session.sql("SELECT count(*) FROM {datasets} WHERE {mark} IS NOT NULL", mark=mark)
        with self._session.reading() as connection:
            (number,) = connection.execute(statement).fetchone()
        return int(number)

    def _save(
        self,
        connection: sqlite3.Connection,
        notifications: Sequence[Notification],
        created_at: object = None,
    ) -> None:
        created_at = created_at or timestamp()
        rows = [
            (new.id, new.run_id, new.body, new.tries, created_at, new.url, new.origin)
            for new in notifications
        ]
        connection.executemany(self._session.sql(_SAVE), rows)


def _first(rows: Iterable[sqlite3.Row], max_bytes: int | None) -> list[PromptId]:
    """Return the ids of the first of these outcomes, of ``max_bytes`` together or just one."""
    found: list[PromptId] = []
    for row in rows:
        outcome = _outcome(row)
        if max_bytes is not None:
            max_bytes -= outcome.size
            if found and max_bytes < 0:
                break
        found.append(outcome.id)
    return found


def _names(notification_id: object) -> dict[str, object]:
    """Return the values of the parameters in ID for a notification's id, as it was read."""
    if not isinstance(notification_id, str) or notification_id == plain_text(notification_id):
        return {"id": notification_id, "raw": None}
    return {"id": None, "raw": notification_id.encode("utf-8", "surrogateescape")}


def _outcome(row: sqlite3.Row) -> UndeliveredOutcome:
    structures = {name: structure_of(row[name]) for name in ("prompt_tags", "image_urls")}
    fields = {**dict(row), **structures, "used": object_of(row["used"])}
    return undelivered_of(id_of(row["_id"]), fields)
