"""Conversion between runs and the fields of their documents or rows, for every adapter."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from text2img.databases import Run
from text2img.databases.documents import COUNTABLE, count_of, number_of, object_of
from text2img.prompts.quoting import quoted

if TYPE_CHECKING:
    from collections.abc import Mapping


log = logging.getLogger(__name__)


def run_fields(run: Run, lease_seconds: float) -> dict[str, object]:
    """Return a run's document without its ``_id`` and the end of its lease, with datetimes.

    While the run is ``running``, the document holds the lease's length: with the lease's end, it gives the
    time of the last write.
    """
    names = ("host", "worker", "status", "started_at", "finished_at", "model")
    counts = ("completed", "failed", "images", "postponed")
    task = ("task_index", "execution")
    pace = ("images_per_second", "steady_images_per_second")
    measured = (*pace, "device_busy", "device_busy_of_run", "peak_memory")
    plain: dict[str, object] = {name: getattr(run, name) for name in (*names, *task, *counts, *measured)}
    lease: dict[str, object] = {"lease_seconds": lease_seconds} if run.status == "running" else {}
    plain |= {"tries": run.tries, **({"resumed_at": run.resumed_at} if run.resumed_at else {})}
    return {**plain, **_cost(run), **lease, "seconds": dict(run.seconds), "versions": dict(run.versions)}


def _cost(run: Run) -> dict[str, object]:
    """Return the fields about cost that are known."""
    cost = run.dollars_per_1000_images
    fields = {"gpu_hour_price": run.gpu_hour_price, "dollars_per_1000_images": cost and round(cost, 6)}
    return {name: value for name, value in fields.items() if value is not None}


def state_of(run: Run) -> str:
    """Return the run's status, or ``interrupted`` if it is ``running`` but its lease has expired."""
    dead = run.status == "running" and run.alive_until is not None and run.alive_until < datetime.now(UTC)
    return "interrupted" if dead else run.status


MAX_SKIPPED_RUNS: Final = 1_000
"""Documents that are not runs of this job, among which its runs are still found."""
_MAX_LABEL: Final = 1_000
"""Characters of a text in a run's document, such as its model."""
_MAX_MEMBERS: Final = 100
"""Stages or versions of a run."""


def run_of(run_id: str, fields: Mapping[str, Any]) -> Run | None:
    """Return the run of a document, or None if the document is not a run of this job.

    Never raises: a field that another program has changed becomes what it can be, or its default.
    """
    started = fields.get("started_at")
    if not isinstance(started, datetime):
        return None
    try:
        return _run_of(run_id, started, fields)
    except Exception as exc:
        log.debug("the document of run %s is read in part", run_id, exc_info=exc)
        return Run(id=run_id, started_at=started, host="", status="unknown")


def _run_of(run_id: str, started: datetime, fields: Mapping[str, Any]) -> Run:
    execution, price = (fields.get(name) for name in ("execution", "gpu_hour_price"))
    until, worker = _moment(fields.get("lease_expires_at")), fields.get("worker")
    lease = number_of(fields.get("lease_seconds"))
    return Run(
        id=run_id,
        started_at=started,
        host=_label(fields.get("host")),
        task_index=_index(fields.get("task_index")),
        execution=_label(execution) or None,
        status=_label(fields.get("status")),
        finished_at=_moment(fields.get("finished_at")),
        model=_label(fields.get("model")) or None,
        completed=count_of(fields.get("completed")),
        failed=count_of(fields.get("failed")),
        images=count_of(fields.get("images")),
        postponed=count_of(fields.get("postponed")),
        images_per_second=number_of(fields.get("images_per_second")),
        steady_images_per_second=number_of(fields.get("steady_images_per_second")),
        device_busy=number_of(fields.get("device_busy")),
        device_busy_of_run=number_of(fields.get("device_busy_of_run")),
        peak_memory=count_of(fields.get("peak_memory")),
        seconds={name: number_of(spent) for name, spent in _members(fields.get("seconds"))},
        versions={name: _label(version) for name, version in _members(fields.get("versions"))},
        gpu_hour_price=None if price is None else number_of(price),
        worker=worker if isinstance(worker, str) else None,
        tries=max(1, count_of(fields.get("tries"))),
        resumed_at=_moment(fields.get("resumed_at")),
        alive_until=until,
        seen_at=_before(until, lease),
    )


def _label(value: object) -> str:
    """Return a text of a run's document; another type is quoted."""
    if value is None:
        return ""
    return value[:_MAX_LABEL] if isinstance(value, str) else quoted(value)


def _index(value: object) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and abs(value) < COUNTABLE else None  # type: ignore[arg-type, return-value]


def _members(value: object) -> list[tuple[str, object]]:
    return [(_label(name), member) for name, member in islice(object_of(value).items(), _MAX_MEMBERS)]


def _before(moment: datetime | None, seconds: float) -> datetime | None:
    """Return the time that many seconds earlier; None without a time, and if there is no such year."""
    try:
        return moment - timedelta(seconds=seconds) if moment and seconds else None
    except OverflowError:
        return None


def _moment(value: object) -> datetime | None:
    return value if isinstance(value, datetime) else None
