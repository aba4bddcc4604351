"""A run that is asked to end in each of several states, and how long it took to: measured, for a table."""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import psutil

from tests.acceptance import product
from tests.chaos.workers import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT)
TARGET = 8.0
"""Seconds from the signal to the process's end: Cloud Run kills after ten."""
IDLE = 0.25
"""A share of the cores: where other processes had more, a stop that misses the target says nothing."""


@dataclass(frozen=True)
class State:
    """A state to be asked in: inside ``enters(site, worker)`` the worker, which ``holds``, is in it.

    ``word`` stands in the first prompt. ``by_itself``: the run ends within its grace period.
    """

    name: str
    enters: Callable
    holds: object = 1
    word: str = ""
    by_itself: bool = False


@contextmanager
def _drawing(site, worker):
    worker.reaches(site.on_device)
    yield


@contextmanager
def _in_a_call(site, worker):
    worker.reaches((site.folder / "blocked").exists)
    yield


@contextmanager
def _loading(site, worker):
    worker.reaches(lambda: site.count("processing"))
    yield


@contextmanager
def _without(gate_of, site, worker, *, silent):
    """The worker has a batch to store, or to write down, and has tried to."""
    worker.reaches(site.on_device)
    gate = gate_of(site)
    with gate.away(silent=silent):
        site.go()
        worker.reaches(gate.missed.is_set)
        yield


def _database(site):
    return site.mongodb


def _bucket(site):
    return site.bucket


STATES = [
    State("stopped while a batch is on the device", _drawing),
    State(
        "stopped while the device is in a call into C of 3 s",
        _in_a_call,
        holds="",
        word="block for 3",
        by_itself=True,
    ),
    State("stopped while the device is in a call into C of 30 s", _in_a_call, holds="", word="block for 30"),
    State("stopped while the weights load", _loading, holds="load"),
    State("stopped while the storage hangs", partial(_without, _bucket, silent=True)),
    State("stopped while the database refuses", partial(_without, _database, silent=False)),
    State("stopped while the database says nothing", partial(_without, _database, silent=True)),
]


def stop(site, state, number):
    """Start a run, ask it to end by this signal when it is in that state, and return the ``seconds`` that it
    took, and the share of the cores that was ``busy`` in the second before: the run itself was waiting.
    """
    with Worker(site, "stopped", holds=state.holds) as worker, state.enters(site, worker):
        busy = psutil.cpu_percent(1) / 100
        asked = time.monotonic()
        status = worker.asked_to_end(number)
        seconds = time.monotonic() - asked
        assert status == 128 + number, worker.text[-3000:]
        assert not (state.by_itself and product.GRACE_EXCEEDED in worker.text), worker.text[-3000:]
    return {"seconds": round(seconds, 2), "busy": busy}


def is_late(attempt):
    """Whether a stop missed its target on cores that nobody else wanted."""
    return attempt.get("seconds", 0) > TARGET and attempt["busy"] < IDLE
