"""Runs, counts, configurations, new prompts and results in SQLite; implements RunStore and Results."""

from __future__ import annotations

import os
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from text2img.databases import Counts, RunTotals, Selection, StoredPrompt, WorkerClaims
from text2img.databases.documents import (
    FAILURE_FIELDS,
    MODEL_TYPE,
    OUTCOME_FIELDS,
    WEBHOOK_ID,
    WEBHOOK_PENDING,
    completed_prompt,
    configuration_of,
    content_of,
    failed_prompt,
    merged_counts,
    missing_configuration,
    new_fields,
    parse_id_candidates,
    rejected_prompt,
    stored_content,
)
from text2img.databases.outcome_updates import score_fields
from text2img.databases.run_documents import MAX_SKIPPED_RUNS, run_fields, run_of
from text2img.databases.sqlite.queue import EXPIRED, LEASED, PENDING, POSTPONED, selected
from text2img.databases.sqlite.session import (
    ID,
    REJECTIONS,
    STATUS,
    columns_of,
    datetime_of,
    id_of,
    names_of,
    object_of,
    structure_of,
    timestamp,
    value_of,
)
from text2img.prompts import Status

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

    from text2img.databases import CompletedPrompt, Failure, NewPrompt, Run
    from text2img.databases.sqlite.session import Session
    from text2img.errors import ErrorCode
    from text2img.prompts import ModelConfiguration, PromptId


_BATCH_SIZE: Final = 1000
_COUNTS: Final = (
    "SELECT {status} AS state, error_code, count(*) AS n, "
    "sum({leased}) AS live, sum(untold IS NOT NULL) AS untold, "
    "sum(webhook_untold IS NOT NULL) AS owed, "
    "sum(CASE WHEN json_valid(image_urls) THEN max(1, json_array_length(image_urls)) ELSE 1 END) AS images, "
    "min(created_at) AS oldest FROM {datasets} WHERE {where} GROUP BY state, error_code"
)
_RUN_TOTALS: Final = (
    "SELECT sum(status = 'completed') AS completed, sum(status = 'error') AS failed, "
    "sum(CASE status WHEN 'completed' THEN coalesce(json_array_length(image_urls), 1) END) AS images "
    "FROM {datasets} WHERE run_id = :run"
)
_HELD_RUN: Final = (
    "SELECT 1 FROM {runs} WHERE _id = :run AND status = 'running' AND lease_expires_at > :now "
    "AND worker IS NOT :worker AND (:replaces IS NULL OR worker IS NOT :replaces)"
)
_CLAIMS_BY_WORKER: Final = (
    "SELECT claimed_by, count(*) AS n, sum(NOT {leased}) AS expired, max(lease_expires_at) AS until "
    "FROM {datasets} WHERE {status} = 'processing' AND {where} GROUP BY claimed_by"
)
_RETRY: Final = (
    "UPDATE {datasets} SET status = 'pending', {removed} WHERE {status} = 'error' AND {with_code} AND {where}"
)
_SCORE_PROMPT: Final = (
    "UPDATE {datasets} SET {written} WHERE _id = {id} AND status = 'completed' AND image_url = :url"
)
_SCORE_RESULT: Final = "UPDATE {dataset_records} SET {written} WHERE dataset_id = {id} AND image_url = :url"
_REQUEUE_CHANGED: Final = (
    "UPDATE {datasets} SET {written}, status = 'pending', {removed} WHERE _id = {id} AND ({differs}) "
    "AND NOT ({status} = 'processing' AND {leased})"
)


_RESTORE: Final = (
    "UPDATE {datasets} SET {written}, status = 'pending', input_file = :input_file, {removed} "
    "WHERE _id = {id} AND status = 'removed'"
)
_FORGET_FILE: Final = "UPDATE {datasets} SET input_file = NULL WHERE _id = {id}"
_COMPARE: Final = (
    "SELECT {status} = 'removed' AS removed, ({differs}) AS differs, "
    "{status} = 'processing' AND {leased} AS held, "
    "(({pending}) OR ({expired})) AND {where} AS waiting FROM {datasets} WHERE _id = {id}"
)
_OF_FILE: Final = (
    "SELECT _id FROM {datasets} WHERE {status} = 'pending' AND input_file = :input_file AND {condition}"
)
_REMOVE: Final = (
    "UPDATE {datasets} SET status = 'removed' "
    "WHERE _id = {id} AND {status} = 'pending' AND input_file = :input_file"
)


class SqliteRunStore:
    """The RunStore part of the database, documented by the Protocol."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def model_configuration(self, config_id: str | None) -> ModelConfiguration | None:
        """See RunStore.model_configuration. Among several of that type, the smallest ``_id`` wins."""
        values = [MODEL_TYPE] if config_id is None else parse_id_candidates(config_id)
        column = "model_type" if config_id is None else "_id"
        where = f" WHERE {column} IN ({', '.join('?' * len(values))}) ORDER BY _id LIMIT 1"
        with self._session.reading() as connection:
            row = connection.execute(
                self._session.sql("SELECT * FROM {model_configs}") + where, values
            ).fetchone()
        if row is not None:
            return configuration_of(id_of(row["_id"]), _configuration_fields(row))
        if config_id is not None:
            raise missing_configuration(config_id, self._session.names["model_configs"])
        return None

    def begin_run(self, run: Run, lease_seconds: float, replaces: str | None = None) -> bool:
        """See RunStore.begin_run. One transaction."""
        values = {"run": run.id, "worker": run.worker, "replaces": replaces, "now": timestamp()}
        with self._session.writing() as connection:
            if connection.execute(self._session.sql(_HELD_RUN), values).fetchone() is not None:
                return False
            self._save_run(connection, run, lease_seconds)
        return True

    def save_run(self, run: Run, lease_seconds: float) -> None:
        """See RunStore.save_run."""
        with self._session.writing() as connection:
            self._save_run(connection, run, lease_seconds)

    def _save_run(self, connection: sqlite3.Connection, run: Run, lease_seconds: float) -> None:
        until = timestamp(lease_seconds) if run.status == "running" else None
        fields = {"_id": run.id, **run_fields(run, lease_seconds), "lease_expires_at": until}
        self._insert(connection, "INSERT OR REPLACE INTO {runs}", fields)

    def last_runs(self, limit: int) -> list[Run]:
        """See RunStore.last_runs. Rows that are not runs of this job are skipped."""
        statement = self._session.sql("SELECT * FROM {runs} ORDER BY started_at DESC, _id LIMIT ?")
        with self._session.reading() as connection:
            rows = connection.execute(statement, (limit + MAX_SKIPPED_RUNS,))
            runs = (run_of(str(id_of(row["_id"])), _run_fields(row)) for row in rows)
            return list(islice((run for run in runs if run is not None), limit))

    def run(self, run_id: str) -> Run | None:
        """See RunStore.run."""
        with self._session.reading() as connection:
            row = connection.execute(
                self._session.sql("SELECT * FROM {runs} WHERE _id = ?"), (run_id,)
            ).fetchone()
        return None if row is None else run_of(run_id, _run_fields(row))

    def run_totals(self, run_id: str) -> RunTotals:
        """See RunStore.run_totals."""
        with self._session.reading() as connection:
            row = connection.execute(self._session.sql(_RUN_TOTALS), {"run": run_id}).fetchone()
        return RunTotals(**{name: int(row[name] or 0) for name in ("completed", "failed", "images")})

    def counts(self, selection: Selection) -> Counts:
        """See RunStore.counts. A snapshot."""
        where, values = selected(selection)
        statement = self._session.sql(_COUNTS, status=STATUS, where=where, leased=LEASED)
        with self._session.reading() as connection:
            return _counts(connection.execute(statement, {**values, "now": timestamp()}).fetchall())

    def claims_by_worker(self, selection: Selection) -> list[WorkerClaims]:
        """See RunStore.claims_by_worker."""
        where, values = selected(selection)
        statement = self._session.sql(_CLAIMS_BY_WORKER, status=STATUS, where=where, leased=LEASED)
        with self._session.reading() as connection:
            rows = connection.execute(statement, {**values, "now": timestamp()}).fetchall()
        return [
            WorkerClaims(
                worker=str(row["claimed_by"] or "unknown"),
                prompts=row["n"],
                expired=row["expired"],
                lease_until=datetime_of(row["until"]),
            )
            for row in rows
        ]

    def enqueue(
        self, prompts: Iterable[NewPrompt], input_file: str | None = None, *, restore: bool = True
    ) -> int:
        """See RunStore.enqueue. In batches of 1,000, each in one transaction."""
        remaining, file = iter(prompts), self._file_name(input_file)
        added = 0
        while batch := list(islice(remaining, _BATCH_SIZE)):
            with self._session.writing() as connection:
                for prompt in batch:
                    added_fields = {**new_fields(prompt, file), "created_at": timestamp()}
                    fields = {"_id": value_of(prompt.id), **added_fields}
                    try:
                        if self._insert_new(connection, fields):
                            added += 1
                        elif restore:
                            added += self._restore(connection, prompt, file)
                    except REJECTIONS as exc:
                        raise rejected_prompt(prompt.id, str(exc)) from exc
        return added

    def _insert_new(self, connection: sqlite3.Connection, fields: Mapping[str, object]) -> int:
        """Insert a row unless its id exists. Raises IntegrityError for another constraint of the table."""
        if self._insert(connection, "INSERT OR IGNORE INTO {datasets}", fields):
            return 1
        known = self._session.sql("SELECT 1 FROM {datasets} WHERE _id = ?")
        if connection.execute(known, (columns_of(fields)["_id"],)).fetchone():
            return 0
        return self._insert(connection, "INSERT INTO {datasets}", fields)

    def _restore(self, connection: sqlite3.Connection, prompt: NewPrompt, file: str | None) -> int:
        """Make a removed prompt pending as if new; without a file, let a known one forget its own."""
        known = self._session.sql("SELECT status, input_file FROM {datasets} WHERE _id = {id}")
        status, own = connection.execute(known, names_of(prompt.id)).fetchone()
        if status != Status.REMOVED:
            if own is not None and file is None:
                connection.execute(self._session.sql(_FORGET_FILE), names_of(prompt.id))
            return 0
        content = columns_of(content_of(prompt))
        restore = self._session.sql(_RESTORE, **_assignments(content), id=ID)
        return connection.execute(restore, {**content, **names_of(prompt.id), "input_file": file}).rowcount

    def _file_name(self, input_file: str | None) -> str | None:
        """Return the path from the database's folder, so that both can move together."""
        if input_file is None:
            return None
        try:
            return os.path.relpath(input_file, self._session.path.absolute().parent)
        except ValueError:  # on another drive of Windows
            return input_file

    def compare(self, prompts: Sequence[NewPrompt], selection: Selection) -> list[StoredPrompt | None]:
        """See RunStore.compare."""
        where, values = selected(selection)
        values |= {"now": timestamp()}
        found: list[StoredPrompt | None] = []
        with self._session.reading() as connection:
            for prompt in prompts:
                content = columns_of(content_of(prompt))
                statement = self._session.sql(
                    _COMPARE,
                    differs=_assignments(content)["differs"],
                    status=STATUS, leased=LEASED, pending=PENDING, expired=EXPIRED, where=where, id=ID,
                )  # fmt: skip
                row = connection.execute(statement, {**content, **values, **names_of(prompt.id)}).fetchone()
                names = ("removed", "differs", "held", "waiting")
                found.append(None if row is None else StoredPrompt(**{n: bool(row[n]) for n in names}))
        return found

    def left_file(
        self, input_file: str, kept: Container[PromptId], selection: Selection | None = None
    ) -> list[PromptId]:
        """See RunStore.left_file."""
        where, values = selected(selection or Selection())
        condition = where if selection is None else f"NOT {POSTPONED} AND {where}"
        statement = self._session.sql(_OF_FILE, status=STATUS, condition=condition)
        values |= {"input_file": self._file_name(input_file), "now": timestamp()}
        with self._session.reading() as connection:
            found = (id_of(row["_id"]) for row in connection.execute(statement, values))
            return [prompt_id for prompt_id in found if prompt_id not in kept]

    def remove(self, prompt_ids: Sequence[PromptId], input_file: str) -> int:
        """See RunStore.remove. One transaction."""
        statement = self._session.sql(_REMOVE, status=STATUS, id=ID)
        file = {"input_file": self._file_name(input_file)}
        with self._session.writing() as connection:
            values = ({**names_of(prompt_id), **file} for prompt_id in prompt_ids)
            return connection.executemany(statement, values).rowcount if prompt_ids else 0

    def stored(self, ids: Sequence[PromptId]) -> dict[PromptId, NewPrompt | None]:
        """See RunStore.stored."""
        statement = self._session.sql("SELECT * FROM {datasets} WHERE _id = {id}")
        found = {}
        with self._session.reading() as connection:
            for prompt_id in ids:
                if (row := connection.execute(statement, names_of(prompt_id)).fetchone()) is not None:
                    structures = {name: structure_of(row[name]) for name in ("lora", "prompt_tags")}
                    found[prompt_id] = stored_content(prompt_id, {**dict(row), **structures})
        return found

    def requeue_changed(self, prompts: Iterable[NewPrompt]) -> int:
        """See RunStore.requeue_changed. In batches of 1,000, each in one transaction."""
        remaining = iter(prompts)
        requeued = 0
        while batch := list(islice(remaining, _BATCH_SIZE)):
            contents = [columns_of(content_of(prompt)) for prompt in batch]
            statement = self._session.sql(
                _REQUEUE_CHANGED,
                **_assignments(contents[0]),
                status=STATUS,
                leased=LEASED,
                id=ID,
            )
            now = timestamp()
            values = [
                {**content, **names_of(prompt.id), "now": now}
                for prompt, content in zip(batch, contents, strict=True)
            ]
            with self._session.writing() as connection:
                requeued += connection.executemany(statement, values).rowcount
        return requeued

    def save_scores(
        self, prompt: CompletedPrompt, scores: Sequence[float | None], evaluation: Mapping[str, object]
    ) -> bool:
        """See RunStore.save_scores. One transaction."""
        columns = columns_of(score_fields(scores, evaluation))
        values = {**columns, **names_of(prompt.id), "url": prompt.image_urls[0]}
        pieces = {"written": ", ".join(f"{name} = :{name}" for name in columns)}
        with self._session.writing() as connection:
            changed = connection.execute(self._session.sql(_SCORE_PROMPT, **pieces), values).rowcount
            if changed:
                connection.execute(self._session.sql(_SCORE_RESULT, **pieces), values)
        return changed > 0

    def retry(self, code: ErrorCode | None, selection: Selection) -> int:
        """See RunStore.retry. One statement."""
        where, values = selected(selection)
        removed = ", ".join(
            f"{name} = NULL" for name in (*FAILURE_FIELDS, "untold", WEBHOOK_PENDING, WEBHOOK_ID, "run_id")
        )
        with_code = "TRUE" if code is None else "error_code = :code"
        statement = self._session.sql(
            _RETRY, removed=removed, status=STATUS, with_code=with_code, where=where
        )
        with self._session.writing() as connection:
            return connection.execute(statement, {**values, "code": code and code.value}).rowcount

    def _insert(self, connection: sqlite3.Connection, into: str, fields: Mapping[str, object]) -> int:
        columns = columns_of(fields)
        names, places = ", ".join(columns), ", ".join(f":{name}" for name in columns)
        return connection.execute(f"{self._session.sql(into)} ({names}) VALUES ({places})", columns).rowcount


def _assignments(content: Iterable[str]) -> dict[str, str]:
    """Return the parts of statements that write a prompt's content, compare it, and remove its outcome."""
    names = list(content)
    return {
        "written": ", ".join(f"{name} = :{name}" for name in names),
        "differs": " OR ".join(f"{name} IS NOT :{name}" for name in names),
        "removed": ", ".join(f"{name} = NULL" for name in OUTCOME_FIELDS),
    }


def _configuration_fields(row: sqlite3.Row) -> dict[str, object]:
    fields = dict(row)
    safety = fields.get("safety_checker")
    # SQLite has no booleans: TRUE and FALSE are stored as 1 and 0.
    safety = bool(safety) if safety in (0, 1) else safety
    return {**fields, "safety_checker": safety, "lora": structure_of(fields.get("lora"))}


def _run_fields(row: sqlite3.Row) -> dict[str, Any]:
    fields = dict(row)
    names = ("started_at", "finished_at", "lease_expires_at", "resumed_at")
    times = {name: datetime_of(fields[name]) for name in names if name in fields}
    objects = {name: object_of(fields[name]) for name in ("seconds", "versions")}
    return {**fields, **times, **objects}


def _counts(rows: list[sqlite3.Row]) -> Counts:
    by_status = {status.value: sum(row["n"] for row in rows if row["state"] == status) for status in Status}
    other = merged_counts((row["state"], row["n"]) for row in rows if row["state"] not in set(Status))
    live = sum(row["live"] for row in rows if row["state"] == Status.PROCESSING)
    created = [datetime_of(row["oldest"]) for row in rows if row["state"] == Status.PENDING]
    return Counts(
        **by_status,
        live_leases=live,
        expired_leases=by_status[Status.PROCESSING.value] - live,
        oldest_pending=min((time for time in created if time is not None), default=None),
        undelivered=sum(row["untold"] for row in rows),
        pending_webhooks=sum(row["owed"] for row in rows),
        images=sum(row["images"] for row in rows if row["state"] == Status.COMPLETED),
        errors={str(row["error_code"]): row["n"] for row in rows if row["state"] == Status.ERROR},
        other=other,
    )


_FINISHED: Final = (
    "SELECT * FROM {datasets} WHERE {status} = :status AND {where} AND (:run IS NULL OR run_id = :run)"
)
_STRUCTURES: Final = ("prompt_tags", "image_urls", "used", "scores", "evaluation", "tries", "sha256s")
_TIMES: Final = ("completed_at", "error_at")


class SqliteResults:
    """The Results part of the database, documented by the Protocol.

    An iterator reads a snapshot from its start; in WAL mode it does not block writers.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    def completed(self, selection: Selection, run_id: str | None = None) -> Iterator[CompletedPrompt]:
        """See Results.completed."""
        return (completed_prompt(*_read(row)) for row in self._finished("completed", selection, run_id))

    def failures(self, selection: Selection, run_id: str | None = None) -> Iterator[Failure]:
        """See Results.failures."""
        return (failed_prompt(*_read(row)) for row in self._finished("error", selection, run_id))

    def _finished(self, status: str, selection: Selection, run_id: str | None) -> Iterator[sqlite3.Row]:
        where, values = selected(selection)
        statement = self._session.sql(_FINISHED, status=STATUS, where=where)
        with self._session.reading() as connection:
            yield from connection.execute(statement, {**values, "status": status, "run": run_id})


def _read(row: sqlite3.Row) -> tuple[Any, str | None, dict[str, Any]]:
    fields: dict[str, Any] = dict(row)
    fields |= {name: structure_of(fields.get(name)) for name in _STRUCTURES}
    fields |= {name: datetime_of(fields.get(name)) for name in _TIMES}
    dataset = fields["dataset_id"]
    return id_of(fields["_id"]), None if dataset is None else str(id_of(dataset)), fields
