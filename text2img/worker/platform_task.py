"""The task of a platform's job that this process is, by the environment variables of the platform.

Cloud Run, Kubernetes (indexed jobs) and Google Batch each number a job's tasks from 0. The number does not
distribute the work (the claims do that): it distinguishes tasks in documents and logs.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from text2img.databases import Run

if TYPE_CHECKING:
    from collections.abc import Mapping

_INDEX_VARIABLES: Final = ("CLOUD_RUN_TASK_INDEX", "JOB_COMPLETION_INDEX", "BATCH_TASK_INDEX")
_EXECUTION_VARIABLES: Final = ("CLOUD_RUN_EXECUTION", "BATCH_JOB_UID")


@dataclass(frozen=True, slots=True)
class Task:
    """One task of a job.

    ``index``: from 0; ``execution``: the platform's name of this execution of the job. None: unknown.
    """

    index: int | None = None
    execution: str | None = None


def find(environment: Mapping[str, str] = os.environ, host: str | None = None) -> Task:
    """Return the task that this process is; with neither index nor execution outside a job.

    Kubernetes has no name for the execution: there it is the pod's host name without the index at its end.
    """
    indexes = (environment.get(name, "") for name in _INDEX_VARIABLES)
    index = next((int(text) for text in indexes if text.isascii() and text.isdigit()), None)
    execution = next((environment[name] for name in _EXECUTION_VARIABLES if environment.get(name)), None)
    if execution is None and environment.get("JOB_COMPLETION_INDEX"):
        job, dash, suffix = (host or socket.gethostname()).rpartition("-")
        execution = job if dash and suffix == environment["JOB_COMPLETION_INDEX"] else None
    return Task(index, execution)


def instance() -> str:
    """Return this process's name at a push gateway: its task index if it has one, else the host.

    A platform's hosts get new names each time, and a gateway never drops a group by itself.
    """
    index = find().index
    return socket.gethostname() if index is None else str(index)


def new_run(run_id: str | None) -> Run:
    """Return the document of a new run, under the given id or a generated one.

    A generated id is unique and sorts by the run's start. All tasks of a job get the same id: each adds its
    index, and so has its own document and its own outcomes to deliver. A task that is retried continues under
    its id, as does a run that is started again with it.
    """
    task, now = find(), datetime.now(UTC)
    if not run_id:
        run_id = f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
    elif task.index is not None:
        run_id = f"{run_id}-{task.index}"
    return Run(
        id=run_id,
        started_at=now,
        host=socket.gethostname(),
        task_index=task.index,
        execution=task.execution,
    )


def mark_logs(task: Task) -> None:
    """Add the task's index and execution to every log record of the root handlers."""
    fields = {"task_index": task.index, "execution": task.execution}
    known = {name: value for name, value in fields.items() if value is not None}

    def mark(record: logging.LogRecord) -> bool:
        vars(record).update(known)
        return True

    for handler in logging.getLogger().handlers:
        handler.addFilter(mark)
