"""Telling, kept in SQLite: untold marks on prompts, and notices in ``callbacks``. The contract is Telling's.

A final outcome's ``untold`` is 1, then the id of the notice that is being made of it, then NULL. Its
``webhook_untold`` is the id that the notice for the prompt's own webhook has, until that is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from text2img.databases import Notification, PendingWebhook
from text2img.databases.documents import WEBHOOK_PENDING, count_of, undelivered_of
from text2img.databases.sqlite.schema import id_of, moment, object_of, structure_of
from text2img.databases.sqlite.session import Session

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Collection, Sequence

    from text2img.databases import UndeliveredOutcome

_MARK: Final = (
    "UPDATE {datasets} SET untold = :notice WHERE _id IN "
    "(SELECT _id FROM {datasets} WHERE untold = 1 AND run_id = :run "
    "LIMIT max(0, :limit - (SELECT count(*) FROM {datasets} WHERE untold = :notice)))"
)
_UNMARK: Final = (
    "UPDATE {datasets} SET untold = 1 WHERE untold IS NOT NULL AND run_id NOT IN "
    "(SELECT _id FROM {runs} WHERE status = 'running' AND lease_expires_at > :now)"
)
_UNTOLD_RUNS: Final = (
    "SELECT DISTINCT run_id FROM {datasets} WHERE untold IS NOT NULL AND run_id NOT IN "
    "(SELECT _id FROM {runs} WHERE status = 'running' AND lease_expires_at > :now) ORDER BY run_id"
)
_DUE: Final = (
    "SELECT * FROM {callbacks} WHERE state = 'due' AND {whose} "
    "AND (not_before IS NULL OR not_before <= :now) "
    "AND (lease_expires_at IS NULL OR lease_expires_at <= :now) ORDER BY created_at, rowid LIMIT 1"
)
_KEEP: Final = (
    "INSERT INTO {callbacks} (_id, run_id, body, tries, state, created_at, url, origin) "
    "VALUES (?, ?, ?, ?, 'due', ?, ?, ?) ON CONFLICT (_id) DO NOTHING"
)
_SENDING: Final = "UPDATE {callbacks} SET tries = ?, claimed_by = ?, lease_expires_at = ? WHERE _id = ?"


class SqliteOutbox(Session):
    """The Telling part of the database; the docstrings of the Protocol hold."""

    def collect(self, run_id: str, notice_id: str, limit: int) -> tuple[list[UndeliveredOutcome], bool]:
        """See Telling.gather. What the notice had gathered before belongs to it still."""
        values = {"notice": notice_id, "run": run_id, "limit": limit}
        with self._writing() as connection:
            connection.execute(self._sql(_MARK), values)
            marked = self._sql("SELECT * FROM {datasets} WHERE untold = :notice ORDER BY _id")
            rows = connection.execute(marked, values).fetchall()
            left = self._sql("SELECT 1 FROM {datasets} WHERE untold = 1 AND run_id = :run LIMIT 1")
            more = connection.execute(left, values).fetchone() is not None
        return [_untold(row) for row in rows], more

    def save_notification(self, notification: Notification) -> None:
        """See Telling.save_notice. One transaction."""
        with self._writing() as connection:
            self._keep(connection, [notification])
            told = self._sql("UPDATE {datasets} SET untold = NULL WHERE untold = ?")
            connection.execute(told, (notification.id,))

    def undelivered_runs(self) -> list[str]:
        """See Telling.untold_runs."""
        now = {"now": moment()}
        with self._writing() as connection:
            # A kept notice and its marks change together: a mark without a notice is a dead run's.
            connection.execute(self._sql(_UNMARK), now)
            return [str(row[0]) for row in connection.execute(self._sql(_UNTOLD_RUNS), now)]

    def pending_webhooks(self, limit: int) -> list[PendingWebhook]:
        """See Telling.owed."""
        statement = self._sql(
            "SELECT * FROM {datasets} WHERE webhook_untold IS NOT NULL AND typeof(webhook_untold) = 'text' "
            "LIMIT ?"
        )
        with self._reading() as connection:
            rows = connection.execute(statement, (limit,)).fetchall()
        return [
            PendingWebhook(
                notice_id=row["webhook_untold"],
                run_id=str(row["run_id"]),
                webhook_url=row["webhook_url"],
                outcome=_untold(row),
            )
            for row in rows
        ]

    def enqueue_webhooks(
        self, pending_webhooks: Sequence[PendingWebhook], notifications: Sequence[Notification]
    ) -> None:
        """See Telling.settle_owed. One transaction."""
        statement = self._sql("UPDATE {datasets} SET webhook_untold = NULL WHERE webhook_untold = ?")
        with self._writing() as connection:
            self._keep(connection, notifications)
            connection.executemany(statement, [(each.notice_id,) for each in pending_webhooks])

    def claim_notification(
        self, worker: str, lease_seconds: float, *, webhooks: bool = False, but: Collection[str] = ()
    ) -> Notification | None:
        """See Telling.claim_notice."""
        others = {f"but_{place}": origin for place, origin in enumerate(but)}
        wanted = f"origin IS NOT NULL AND origin NOT IN ({', '.join(f':{name}' for name in others)})"
        statement = self._sql(_DUE, whose=wanted if webhooks else "origin IS NULL")
        with self._writing() as connection:
            row = connection.execute(statement, {"now": moment(), **others}).fetchone()
            if row is None:
                return None
            tries = count_of(row["tries"]) + 1
            connection.execute(self._sql(_SENDING), (tries, worker, moment(lease_seconds), row["_id"]))
        fields = {name: row[name] for name in ("run_id", "body", "url", "origin")}
        return Notification(id=row["_id"], tries=tries, **fields)

    def complete_notification(self, notification: Notification, *, told: bool, detail: str) -> None:
        """See Telling.close_notice. A notice that is closed stays as it is."""
        statement = self._sql(
            "UPDATE {callbacks} SET state = ?, detail = ?, closed_at = ?, claimed_by = NULL, "
            "lease_expires_at = NULL, not_before = NULL WHERE _id = ? AND state = 'due'"
        )
        with self._writing() as connection:
            connection.execute(statement, ("told" if told else "refused", detail, moment(), notification.id))

    def reschedule_notification(self, notification: Notification, wait: float, detail: str) -> None:
        """See Telling.postpone_notice. Passed over where another worker has tried it since."""
        statement = self._sql(
            "UPDATE {callbacks} SET not_before = ?, detail = ?, claimed_by = NULL, lease_expires_at = NULL "
            "WHERE _id = ? AND state = 'due' AND tries = ?"
        )
        with self._writing() as connection:
            connection.execute(statement, (moment(wait), detail, notification.id, notification.tries))

    def notifications(self, *, webhooks: bool = False) -> tuple[int, int]:
        """See Telling.notices."""
        statement = self._sql(
            "SELECT state, count(*) FROM {callbacks} WHERE state <> 'told' AND origin {whose} GROUP BY state",
            whose="IS NOT NULL" if webhooks else "IS NULL",
        )
        with self._reading() as connection:
            standing = dict(tuple(row) for row in connection.execute(statement))
        return standing.get("due", 0), standing.get("refused", 0)

    def undelivered(self, *, webhooks: bool = False) -> int:
        """See Telling.untold."""
        mark = WEBHOOK_PENDING if webhooks else "untold"
        statement = self._sql("SELECT count(*) FROM {datasets} WHERE {mark} IS NOT NULL", mark=mark)
        with self._reading() as connection:
            (number,) = connection.execute(statement).fetchone()
        return int(number)

    def _keep(self, connection: sqlite3.Connection, notifications: Sequence[Notification]) -> None:
        rows = [
            (each.id, each.run_id, each.body, each.tries, moment(), each.url, each.origin)
            for each in notifications
        ]
        connection.executemany(self._sql(_KEEP), rows)


def _untold(row: sqlite3.Row) -> UndeliveredOutcome:
    structures = {name: structure_of(row[name]) for name in ("prompt_tags", "image_urls")}
    fields = {**dict(row), **structures, "used": object_of(row["used"])}
    return undelivered_of(id_of(row["_id"]), fields)
