"""Keeps the libraries' warnings, log lines and bars from the job's output.

What they would say is either checked by the engine and raised as an error, or of no use to who runs it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def hush() -> None:
    """Import the libraries in the order that lets them be silenced before they speak.

    diffusers makes transformers warn while it is imported, so transformers is silenced first.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns wherever a process forks
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    hush_hub()


def hush_hub() -> None:
    """Silence the hub's client alone, which needs no torch."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    with quiet():  # it warns when an environment variable wants the bars
        disable_progress_bars()
    for name in ("huggingface_hub", "httpx", "httpx2"):  # the HTTP client logs every request
        logging.getLogger(name).setLevel(logging.ERROR)


class _Silence:
    """Python's warnings ignored while anybody is within; the filters are the process's, not a thread's.

    Each thread saving and restoring them for itself could leave those of another one behind.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0
        self._saved = warnings.catch_warnings()

    def enter(self) -> None:
        with self._lock:
            self._within += 1
            if self._within == 1:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.simplefilter("ignore")

    def leave(self) -> None:
        with self._lock:
            self._within -= 1
            if self._within == 0:
                self._saved.__exit__(None, None, None)


_silence = _Silence()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ignore Python warnings while the libraries work; from any thread, and within itself."""
    _silence.enter()
    try:
        yield
    finally:
        _silence.leave()
