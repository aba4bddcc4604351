"""A run as a document, and back, for every adapter. Knows no database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from text2img.databases import Run
from text2img.databases.documents import count_of, number_of, object_of

if TYPE_CHECKING:
    from collections.abc import Mapping


def run_fields(run: Run, lease_seconds: float) -> dict[str, object]:
    """A run's document without its ``_id`` and the end of its lease; moments in time are datetimes.

    While it runs, the lease's length stands beside its end, and so tells when it was written.
    """
    names = ("host", "worker", "status", "started_at", "finished_at", "model")
    counts = ("completed", "failed", "images", "postponed")
    task = ("task_index", "execution")
    pace = ("images_per_second", "steady_images_per_second")
    measured = (*pace, "device_busy", "device_busy_of_run", "peak_memory")
    plain: dict[str, object] = {name: getattr(run, name) for name in (*names, *task, *counts, *measured)}
    alive: dict[str, object] = {"lease_seconds": lease_seconds} if run.status == "running" else {}
    return {**plain, **_cost(run), **alive, "seconds": dict(run.seconds), "versions": dict(run.versions)}


def _cost(run: Run) -> dict[str, object]:
    """What it costs, where that is known."""
    cost = run.dollars_per_1000_images
    fields = {"gpu_hour_price": run.gpu_hour_price, "dollars_per_1000_images": cost and round(cost, 6)}
    return {name: value for name, value in fields.items() if value is not None}


def state_of(run: Run) -> str:
    """How a run stands: its status, but ``interrupted`` where it gives no sign of life any more."""
    gone = run.status == "running" and run.alive_until is not None and run.alive_until < datetime.now(UTC)
    return "interrupted" if gone else run.status


def run_of(run_id: str, fields: Mapping[str, Any]) -> Run | None:
    """The run of a document, or None where the document is no run of this job."""
    started, finished = fields.get("started_at"), fields.get("finished_at")
    expires, index, execution = (fields.get(name) for name in ("lease_expires_at", "task_index", "execution"))
    if not isinstance(started, datetime):
        return None
    price, until = fields.get("gpu_hour_price"), expires if isinstance(expires, datetime) else None
    lease = number_of(fields.get("lease_seconds"))
    return Run(
        id=run_id,
        started_at=started,
        host=str(fields.get("host") or ""),
        task_index=index if isinstance(index, int) else None,
        execution=str(execution) if execution else None,
        status=str(fields.get("status") or ""),
        finished_at=finished if isinstance(finished, datetime) else None,
        model=fields.get("model"),
        completed=count_of(fields.get("completed")),
        failed=count_of(fields.get("failed")),
        images=count_of(fields.get("images")),
        postponed=count_of(fields.get("postponed")),
        images_per_second=number_of(fields.get("images_per_second")),
        steady_images_per_second=number_of(fields.get("steady_images_per_second")),
        device_busy=number_of(fields.get("device_busy")),
        device_busy_of_run=number_of(fields.get("device_busy_of_run")),
        peak_memory=count_of(fields.get("peak_memory")),
        seconds=object_of(fields.get("seconds")),
        versions=object_of(fields.get("versions")),
        gpu_hour_price=None if price is None else number_of(price),
        worker=_text(fields.get("worker")),
        alive_until=until,
        seen_at=until - timedelta(seconds=lease) if until and lease else None,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
