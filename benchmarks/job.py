"""The whole job as a user starts it, with another engine in the place of diffusers', in a process of its own.

The engine is the one part that the command line builds itself; it is exchanged here and nowhere else.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, ParamSpec, TypeVar
from unittest.mock import patch

from text2img import cli
from text2img.worker import build

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from multiprocessing.synchronize import Barrier
    from pathlib import Path

    from text2img.engine import Engine

P = ParamSpec("P")
T = TypeVar("T")

_READY_WITHIN = 120.0
"""Seconds for processes to have imported and opened what they need, on busy cores."""
_barriers: list[Barrier] = []


@dataclass(frozen=True, slots=True)
class Span:
    """When a job began and ended (``time.monotonic``), and this process's processor seconds at its end."""

    begun: float
    ended: float
    cpu: float


def apart(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of ``work`` in a fresh process, which shares no interpreter with servers and proxies."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(work, *args, **kwargs).result()


def at_once(work: Callable[..., T], arguments: Sequence[tuple[object, ...]]) -> list[T]:
    """The results of ``work(*each, ready)``, each in a fresh process, all of them at once.

    ``ready()`` returns when every one has called it: what comes after begins at the same moment.
    """
    context = get_context("spawn")
    barrier = context.Barrier(len(arguments))
    with ProcessPoolExecutor(len(arguments), context, _inherit, (barrier,)) as processes:
        return list(processes.map(_with_others, itertools.repeat(work), arguments))


def _inherit(barrier: Barrier) -> None:
    _barriers.append(barrier)  # which can be handed to a process as it begins, and not later


def _with_others(work: Callable[..., T], arguments: tuple[object, ...]) -> T:
    (barrier,) = _barriers
    return work(*arguments, lambda: barrier.wait(_READY_WITHIN))


def run_job(engine: Engine, arguments: Sequence[str], variables: Mapping[str, str], folder: Path) -> Span:
    """``text2img run`` with these arguments, its logs as JSON lines in ``folder``.

    Neither an .env file nor a variable of this process's reaches it but ``variables``. Raises RuntimeError
    with the log's end where the job does not end with status 0.
    """
    log = folder / "job.log"
    with (
        _environment(variables, folder),
        log.open("w", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        patch.object(build, "engine", lambda *_, **__: engine),
    ):
        begun = time.monotonic()
        status = cli.main(["run", *arguments])
        span = Span(begun, time.monotonic(), time.process_time())
    if status != 0:
        raise RuntimeError(f"the job ended with status {status}: {log.read_text(encoding='utf-8')[-1000:]}")
    return span


def clean_environment() -> dict[str, str]:
    """This process's environment without the product's own variables."""
    from text2img.settings import options

    variables = {option.variable for option in options()}
    return {name: value for name, value in os.environ.items() if name not in variables}


@contextlib.contextmanager
def _environment(variables: Mapping[str, str], folder: Path) -> Iterator[None]:
    with patch.dict(os.environ, clean_environment() | dict(variables), clear=True), contextlib.chdir(folder):
        yield
