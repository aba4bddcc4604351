"""Ray itself: started on this machine, for this run alone, or joined where it runs already.

One that is started listens on the loopback device alone, asks for a token, tells nobody of its use and keeps
its files in a temporary folder. Knows nothing of what is worked on.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TextIO

from text2img.errors import ConfigurationError, RunFailed

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

_ALONE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the one way to have it listen on 127.0.0.1 alone
    "RAY_AUTH_MODE": "token",
}
_ALWAYS = {"RAY_USAGE_STATS_ENABLED": "0"}
_OBJECTS = 80 * 1024 * 1024
"""Bytes of shared memory for objects, next to the least that Ray takes: what is said here is small."""
_LOOK = 0.05  # seconds


@dataclass(frozen=True, slots=True)
class Cluster:
    """What is there: GPUs, and machines by their addresses."""

    gpus: int
    machines: frozenset[str]


def check(address: str | None) -> None:
    """Raise ConfigurationError for what cannot be, as far as it is known without asking anybody."""
    if find_spec("ray") is None:
        raise ConfigurationError("--workers needs Ray; pip install 'ray==2.60.0'")
    if address is not None and address.startswith("ray://"):
        raise ConfigurationError(
            "--ray-address (RAY_ADDRESS): a run has to begin on a machine of the cluster (ray job submit), "
            "not at the end of a ray:// connection"
        )


def is_here(address: str | None) -> bool:
    """Whether Ray's address (None: one that is started here; auto; HOST:PORT) may be this very machine's."""
    host = "" if address in {None, "auto", "local"} else str(address).rpartition(":")[0].strip("[]")
    if host in {"", "localhost", socket.gethostname()}:
        return True
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((str(ipaddress.ip_address(host)), 0))
    except (OSError, ValueError):
        return False
    return True


@contextmanager
def joined(address: str | None) -> Iterator[Cluster]:
    """Ray, started or joined; leaving the block ends what was started. Called from the main thread.

    Raises RunFailed where that cannot be.
    """
    folder = tempfile.mkdtemp(prefix="text2img-ray-") if address is None else None
    os.environ.update(_ALWAYS)
    if folder is not None:
        os.environ.update(_ALONE, RAY_AUTH_TOKEN=secrets.token_hex(32))
    session = _Session(address, folder)
    with redirect_stdout(_Hushed(sys.stdout)):  # also while Ray ends: it has most to say then
        try:
            session.start()
            yield _found()
        finally:
            session.end()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


class _Session:
    """A thread that has started Ray and stays: the processes that it starts are killed when it ends, as the
    kernel does for us where this whole process dies.
    """

    def __init__(self, address: str | None, folder: str | None) -> None:
        self._address, self._folder = address, folder
        self._begun, self._over = threading.Event(), threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._hold, name="ray_session", daemon=True)

    def start(self) -> None:
        """Begin; returns once Ray is there. Raises RunFailed."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        records = logging.getLogRecordFactory()
        self._thread.start()
        begun = False
        while not begun:
            begun = self._begun.wait(_LOOK)
            for number, handler in handlers.items():  # Ray puts its own there, whose end is an abort
                signal.signal(number, handler)
            logging.setLogRecordFactory(records)  # Ray's marks every record of everybody's
        if self._failure is not None:
            first = (str(self._failure).splitlines() or [""])[0]
            where = f"at {self._address} cannot be joined" if self._address else "does not start"
            raise RunFailed(f"Ray {where}: {first or type(self._failure).__name__}") from self._failure

    def end(self) -> None:
        """End what was started."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _hold(self) -> None:
        try:
            import ray

            ray.init(**self._options())
        except Exception as exc:  # noqa: BLE001 - it is raised again in the main thread
            self._failure = exc
        finally:
            self._begun.set()
        self._over.wait()
        with suppress(Exception):
            ray.shutdown()

    def _options(self) -> dict[str, Any]:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address is not None:
            return {"address": self._address, **quiet}
        own = {"include_dashboard": False, "object_store_memory": _OBJECTS, "_temp_dir": self._folder}
        return {"address": "local", "num_cpus": 1, **own, **quiet}


class _Hushed:
    """Standard output, but for what Ray prints, in threads that are called so: that is logged as DEBUG."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As TextIO.write."""
        if not threading.current_thread().name.startswith("ray_"):
            return self._stream.write(text)
        if text.strip():
            log.debug("Ray: %s", text.strip())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _found() -> Cluster:
    import ray

    machines = frozenset(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
    return Cluster(int(ray.cluster_resources().get("GPU", 0)), machines)
