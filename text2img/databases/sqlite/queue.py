"""The queue in SQLite: claim, renew, record and release prompts; implements Queue.

A claim reads pending prompts first, and expired leases only if there were too few pending ones: one
statement for both is many times slower. Each method is one transaction.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from text2img.databases.documents import (
    CLAIM_FIELDS,
    PROMPT_FIELDS,
    UNSCORED_FIELD,
    count_of,
    deaths_at_claim,
    parse_id_candidates,
    prompt_of,
)
from text2img.databases.outcome_updates import (
    absent_from,
    change_of,
    probe,
    result_of,
    unwritable,
    unwritable_message,
    written_already,
)
from text2img.databases.sqlite.session import (
    ID,
    IN_FUTURE,
    PRIORITY,
    REJECTIONS,
    STATUS,
    columns_of,
    id_of,
    names_of,
    reason_of,
    structure_of,
    timestamp,
    value_of,
)
from text2img.errors import DatabaseFailed, WritesRejected
from text2img.prompts import Claim, Completed, Failed

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping, Sequence

    from text2img.databases import PutAside, Selection
    from text2img.databases.sqlite.session import Session
    from text2img.prompts import Outcome, Prompt

LEASED: Final = IN_FUTURE.format("lease_expires_at")
POSTPONED: Final = IN_FUTURE.format("not_before")
PENDING: Final = f"{STATUS} = 'pending' AND NOT {POSTPONED}"
EXPIRED: Final = f"{STATUS} = 'processing' AND NOT {LEASED}"
ORDER: Final = f"ORDER BY {PRIORITY} DESC, _id LIMIT :limit"
HELD: Final = f"_id = {ID} AND status = 'processing' AND claimed_by = :worker AND claim_number = :number"
RELEASED: Final = f"status = 'pending', {', '.join(f'{name} = NULL' for name in CLAIM_FIELDS)}"

_READ: Final = "SELECT _id, {fields} FROM {datasets} WHERE {condition} AND {where} {order}"
_UPDATE: Final = "UPDATE {datasets} SET {assignments} WHERE {held}"
_EXPIRE: Final = (
    "UPDATE {datasets} SET lease_expires_at = :now WHERE status = 'processing' AND claimed_by = :worker"
)
_CLAIM: Final = (
    "UPDATE {datasets} SET status = 'processing', claimed_by = :worker, claim_number = :number, "
    "claim_token = :token, lease_expires_at = :until, deaths = :deaths, started_claim = NULL, "
    "not_before = NULL WHERE _id = {id}"
)
_ROW: Final = "SELECT * FROM {datasets} WHERE _id = {id}"
_SUPERSEDING: Final = (
    "SELECT claim_number FROM {dataset_records} WHERE dataset_id = {id} AND claim_number > :number"
)
_UPSERT: Final = (
    "INSERT INTO {dataset_records} ({columns}) VALUES ({places}) "
    "ON CONFLICT (dataset_id) DO UPDATE SET {updates}"
)
_HAS_CLAIMABLE: Final = "SELECT EXISTS (SELECT 1 FROM {datasets} WHERE {condition} AND {where})"
_COUNT: Final = "SELECT count(*) FROM {datasets} WHERE {condition} AND {where}"


class SqliteQueue:
    """The Queue part of the database, documented by the Protocol."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def claim(
        self,
        worker: str,
        limit: int,
        lease_seconds: float,
        selection: Selection,
        put_aside: PutAside | None = None,
    ) -> list[Prompt]:
        """See Queue.claim. One transaction: concurrent workers wait for each other."""
        marks = {"token": uuid.uuid4().hex, "until": timestamp(lease_seconds)}
        while True:
            rejected: list[tuple[Prompt, str]] = []
            with self._session.writing() as connection:
                prompts = [_prompt(row, worker) for row in self._next(connection, limit, selection)]
                for prompt in prompts:
                    values = {**marks, **_names(prompt.claim), "deaths": prompt.deaths}
                    try:
                        connection.execute(self._session.sql(_CLAIM), values)
                    except REJECTIONS as exc:
                        rejected.append((prompt, unwritable_message(reason_of(exc))))
            for prompt, reason in rejected:
                (put_aside or _refuse)(prompt, reason)
            aside = {prompt.id for prompt, _ in rejected}
            claimed = [prompt for prompt in prompts if prompt.id not in aside]
            if claimed or not aside:
                return claimed
            selection = replace(selection, exclude=selection.exclude | aside)

    def peek(self, limit: int, selection: Selection) -> list[Prompt]:
        """See Queue.peek."""
        with self._session.reading() as connection:
            return [_prompt(row, "unclaimed") for row in self._next(connection, limit, selection)]

    def start(self, claims: Sequence[Claim], left: Sequence[Claim] = ()) -> None:
        """See Queue.start."""
        with self._session.writing() as connection:
            self._change_held(connection, "started_claim = claim_number", claims)
            self._change_held(connection, "started_claim = NULL", left)

    def extend(self, claims: Sequence[Claim], lease_seconds: float) -> list[Claim]:
        """See Queue.extend."""
        return self._update_held("lease_expires_at = :until", claims, {"until": timestamp(lease_seconds)})

    def holds(self, claim: Claim) -> bool:
        """See Queue.holds."""
        statement = self._session.sql("SELECT 1 FROM {datasets} WHERE {held}", held=HELD)
        with self._session.reading() as connection:
            found = connection.execute(statement, _names(claim))
            return found.fetchone() is not None

    def record(
        self,
        outcomes: Sequence[Outcome],
        run_id: str,
        *,
        notify: bool,
        put_aside: PutAside | None = None,
    ) -> list[Outcome]:
        """See Queue.record. Results and prompts change together, in one transaction."""
        recorded: list[Outcome] = []
        rejected: list[Failed] = []
        with self._session.writing() as connection:
            for outcome in outcomes:
                try:
                    if self._record(connection, outcome, run_id, notify=notify):
                        recorded.append(outcome)
                except REJECTIONS as exc:
                    failed = unwritable(outcome, reason_of(exc))
                    try:
                        if self._record(connection, failed, run_id, notify=notify):
                            recorded.append(failed)
                    except REJECTIONS as second:
                        reason_of(second)
                        self._change_held(connection, RELEASED, [failed.claim])
                        rejected.append(failed)
        for failed in rejected:
            (put_aside or _refuse)(failed.prompt, failed.message)
        return recorded

    def check_results(self) -> None:
        """See Queue.check_results. Two results: an index that takes one may reject the second."""
        run_id = f"text2img-check-{uuid.uuid4().hex}"
        with self._session.rehearsing() as connection:
            connection.execute("SAVEPOINT probe")
            try:
                for number in range(2):
                    self._record_result(connection, probe(f"{run_id}-{number}"), run_id)
            except REJECTIONS as exc:
                raise WritesRejected(f"the table of results does not take them: {reason_of(exc)}") from exc
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK TO probe")
                    connection.execute("RELEASE probe")

    def check_claim(self, selection: Selection) -> None:
        """See Queue.check_claim. The prompt itself is claimed, and that is undone."""
        with self._session.rehearsing() as connection:
            connection.execute("SAVEPOINT probe")
            try:
                for prompt in [_prompt(row, "check") for row in self._next(connection, 1, selection)]:
                    marks = {"token": "check", "until": timestamp(), "deaths": prompt.deaths}
                    connection.execute(self._session.sql(_CLAIM), {**marks, **_names(prompt.claim)})
            except REJECTIONS as exc:
                raise WritesRejected(f"{prompt.id}: {unwritable_message(reason_of(exc))}") from exc
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK TO probe")
                    connection.execute("RELEASE probe")

    def release(self, claims: Sequence[Claim]) -> None:
        """See Queue.release."""
        self._update_held(RELEASED, claims)

    def release_stalled(self, claims: Sequence[Claim]) -> None:
        """See Queue.release_stalled. One transaction."""
        with self._session.writing() as connection:
            for claim in claims:
                row = connection.execute(self._session.sql(_ROW), _names(claim)).fetchone()
                deaths = count_of(row["deaths"]) + 1 if row is not None else 1
                self._change_held(connection, f"{RELEASED}, deaths = :deaths", [claim], {"deaths": deaths})

    def release_dead(self, worker: str) -> int:
        """See Queue.release_dead."""
        with self._session.writing() as connection:
            return connection.execute(
                self._session.sql(_EXPIRE), {"worker": worker, "now": timestamp()}
            ).rowcount

    def has_claimable(self, selection: Selection) -> bool:
        """See Queue.has_claimable. Two index lookups, each of which stops at the first prompt."""
        where, values = selected(selection)
        statements = (
            self._session.sql(_HAS_CLAIMABLE, condition=condition, where=where)
            for condition in (PENDING, EXPIRED)
        )
        values["now"] = timestamp()
        with self._session.reading() as connection:
            return any(connection.execute(statement, values).fetchone()[0] for statement in statements)

    def pending(self, selection: Selection) -> int:
        """See Queue.pending."""
        return self._count(f"(({PENDING}) OR ({EXPIRED}))", selection)

    def postponed(self, selection: Selection) -> int:
        """See Queue.postponed."""
        return self._count(f"{STATUS} = 'pending' AND {POSTPONED}", selection)

    def _next(self, connection: sqlite3.Connection, limit: int, selection: Selection) -> list[sqlite3.Row]:
        rows = self._claimable(connection, PENDING, limit, selection)
        if len(rows) < limit:
            rows += self._claimable(connection, EXPIRED, limit - len(rows), selection)
        return rows

    def _claimable(
        self, connection: sqlite3.Connection, condition: str, limit: int, selection: Selection
    ) -> list[sqlite3.Row]:
        where, values = selected(selection)
        values |= {"now": timestamp(), "limit": max(limit, 0)}
        fields = ", ".join(PROMPT_FIELDS)
        statement = self._session.sql(_READ, fields=fields, condition=condition, where=where, order=ORDER)
        return connection.execute(statement, values).fetchall()

    def _update_held(
        self, assignments: str, claims: Sequence[Claim], values: Mapping[str, object] | None = None
    ) -> list[Claim]:
        """Update the prompts of the claims; return the claims that are lost."""
        with self._session.writing() as connection:
            return self._change_held(connection, assignments, claims, values)

    def _change_held(
        self,
        connection: sqlite3.Connection,
        assignments: str,
        claims: Sequence[Claim],
        values: Mapping[str, object] | None = None,
    ) -> list[Claim]:
        """Update the prompts of the claims; return the claims that are lost or whose documents reject it."""
        statement = self._session.sql(_UPDATE, assignments=assignments, held=HELD)
        lost: list[Claim] = []
        for claim in claims:
            try:
                changed = connection.execute(statement, {**(values or {}), **_names(claim)}).rowcount
            except REJECTIONS as exc:
                reason_of(exc)
                changed = 0
            if not changed:
                lost.append(claim)
        return lost

    def _record(self, connection: sqlite3.Connection, outcome: Outcome, run_id: str, *, notify: bool) -> bool:
        """Record the outcome, or nothing of it if any part is rejected; return False if its claim is lost."""
        connection.execute("SAVEPOINT outcome")
        try:
            recorded = self._record_parts(connection, outcome, run_id, notify=notify)
        except REJECTIONS:
            connection.execute("ROLLBACK TO outcome")
            raise
        finally:
            if connection.in_transaction:
                connection.execute("RELEASE outcome")
        return recorded

    def _record_parts(
        self, connection: sqlite3.Connection, outcome: Outcome, run_id: str, *, notify: bool
    ) -> bool:
        names = _names(outcome.claim)
        row = connection.execute(self._session.sql(_ROW), names).fetchone()
        if row is None or row["status"] != "processing":
            return row is not None and written_already(outcome, run_id, dict(row))
        if (row["claimed_by"], row["claim_number"]) != (names["worker"], names["number"]):
            return False
        if isinstance(outcome, Completed) and not self._record_result(connection, outcome, run_id):
            return False
        change = change_of(outcome, run_id, notify=notify)
        fields = {**change.fields, **dict.fromkeys(change.removed)}
        if change.timestamp is not None:
            fields[change.timestamp] = timestamp()
        if change.wait is not None:
            fields["not_before"] = timestamp(change.wait)
        self._set(connection, columns_of(fields), names)
        return True

    def _record_result(self, connection: sqlite3.Connection, done: Completed, run_id: str) -> bool:
        """Upsert the result; return False and requeue the prompt if a result has a greater claim number.

        That is only possible if the owner requeued the prompt without its claim number. Its next claim's
        number must be above the result's.
        """
        names = _names(done.claim)
        superseding = connection.execute(self._session.sql(_SUPERSEDING), names).fetchone()
        if superseding is not None:
            fields = {"status": "pending", **dict.fromkeys(CLAIM_FIELDS), "claim_number": superseding[0]}
            self._set(connection, fields, names)
            return False
        removed = dict.fromkeys(absent_from(done))
        result = columns_of({**result_of(done, run_id), **removed, "created_at": timestamp()})
        columns = ", ".join(["dataset_id", *result])
        places = ", ".join([ID, *(f":{name}" for name in result)])
        updates = ", ".join(f"{name} = excluded.{name}" for name in result)
        statement = self._session.sql(_UPSERT, columns=columns, places=places, updates=updates)
        connection.execute(statement, {**result, **names_of(done.claim.id)})
        return True

    def _set(
        self, connection: sqlite3.Connection, columns: Mapping[str, object], names: Mapping[str, object]
    ) -> None:
        assignments = ", ".join(f"{name} = :new_{name}" for name in columns)
        values = {f"new_{name}": value for name, value in columns.items()}
        statement = self._session.sql(_UPDATE, assignments=assignments, held=HELD)
        connection.execute(statement, {**values, **names})

    def _count(self, condition: str, selection: Selection) -> int:
        where, values = selected(selection)
        statement = self._session.sql(_COUNT, condition=condition, where=where)
        with self._session.reading() as connection:
            return int(connection.execute(statement, {**values, "now": timestamp()}).fetchone()[0])


def selected(selection: Selection) -> tuple[str, dict[str, Any]]:
    """Return the condition of a selection, and the values of its parameters."""
    conditions: list[str] = ["TRUE"]
    values: dict[str, Any] = {}
    if selection.dataset_id is not None:
        candidates = parse_id_candidates(selection.dataset_id)
        values |= {f"dataset_{index}": value for index, value in enumerate(candidates)}
        conditions.append(f"dataset_id IN ({', '.join(f':{name}' for name in values)})")
    if selection.exclude:
        excluded = {f"exclude_{index}": value_of(each) for index, each in enumerate(selection.exclude)}
        conditions.append(f"_id NOT IN ({', '.join(f':{name}' for name in excluded)})")
        values |= excluded
    return " AND ".join(conditions), values


def _refuse(prompt: Prompt, reason: str) -> None:
    raise DatabaseFailed(f"{prompt.id}: {reason}")


def _names(claim: Claim) -> dict[str, object]:
    return {**names_of(claim.id), "worker": claim.worker, "number": claim.number}


def _prompt(row: sqlite3.Row, worker: str) -> Prompt:
    structures = ("lora", "prompt_tags", "tries", "sha256s", UNSCORED_FIELD)
    fields = {**dict(row), **{name: structure_of(row[name]) for name in structures}}
    number = count_of(fields["claim_number"]) + 1
    return prompt_of(Claim(id_of(fields["_id"]), worker, number), fields, deaths_at_claim(fields))
