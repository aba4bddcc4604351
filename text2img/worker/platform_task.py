"""Which task of a platform's job this process is, by the variables that the platform sets.

Cloud Run, Kubernetes (indexed jobs) and Google Batch each number a job's tasks from 0. Nothing is shared out
by that number (the claims do that): it stands in documents and logs, to tell tasks apart.
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

_INDEXES: Final = ("CLOUD_RUN_TASK_INDEX", "JOB_COMPLETION_INDEX", "BATCH_TASK_INDEX")
_EXECUTIONS: Final = ("CLOUD_RUN_EXECUTION", "BATCH_JOB_UID")


@dataclass(frozen=True, slots=True)
class Task:
    """``index``: from 0; ``execution``: the platform's name of this execution of the job. None: not known."""

    index: int | None = None
    execution: str | None = None


def find(environment: Mapping[str, str] = os.environ, host: str | None = None) -> Task:
    """The task that this process is; without either fact where it is none.

    Kubernetes names no execution: there it is the pod's host name, less the index that ends it.
    """
    numbers = (environment.get(name, "") for name in _INDEXES)
    index = next((int(number) for number in numbers if number.isascii() and number.isdigit()), None)
    execution = next((environment[name] for name in _EXECUTIONS if environment.get(name)), None)
    if execution is None and environment.get("JOB_COMPLETION_INDEX"):
        job, dash, end = (host or socket.gethostname()).rpartition("-")
        execution = job if dash and end == environment["JOB_COMPLETION_INDEX"] else None
    return Task(index, execution)


def instance() -> str:
    """Return this process's name at a push gateway: its task index if it has one, else the host.

    A platform's hosts get new names each time, and a gateway never drops a group by itself.
    """
    index = find().index
    return socket.gethostname() if index is None else str(index)


def new_run(given: str | None) -> Run:
    """The document of a run that begins, under the id that was given or else one of its own, which sorts by
    its start and meets no other.

    All tasks of a job are given the same id: each adds its index, and so has a document and outcomes to tell
    of its own. A task that is tried again goes on under its id, as a run does that is given it once more.
    """
    task, now = find(), datetime.now(UTC)
    if not given:
        given = f"{now:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
    elif task.index is not None:
        given = f"{given}-{task.index}"
    return Run(
        id=given,
        started_at=now,
        host=socket.gethostname(),
        task_index=task.index,
        execution=task.execution,
    )


def mark_logs(task: Task) -> None:
    """Have every line for machines say of which task it is."""
    facts = {"task_index": task.index, "execution": task.execution}
    known = {name: value for name, value in facts.items() if value is not None}

    def mark(record: logging.LogRecord) -> bool:
        vars(record).update(known)
        return True

    for handler in logging.getLogger().handlers:
        handler.addFilter(mark)
