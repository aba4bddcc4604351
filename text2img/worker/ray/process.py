"""Ray and the worker processes: start or join Ray, start workers, exchange messages, detect when one dies."""

from __future__ import annotations

import io
import ipaddress
import logging
import os
import queue
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

from text2img.concurrency.signals import Stop
from text2img.errors import ConfigurationError, RunFailed, Stopped, Text2ImgError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


log = logging.getLogger(__name__)

_MAX_CONCURRENCY = 4  # calls that a worker process handles at once: its work, and messages to it


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """The process ended without a WorkerExited; ``reason`` is Ray's."""

    reason: str


class _Actor:
    """The Ray actor that runs in a worker process."""

    def __init__(self) -> None:
        self._channel = WorkerChannel()

    def work(self, target: Callable[[WorkerChannel], None]) -> Iterator[object]:
        """Run the worker; see WorkerChannel.work."""
        yield from self._channel.work(target)

    def receive(self, message: QuotaGranted | Resume | Shutdown) -> None:
        """Take a message of the run; see WorkerChannel.receive."""
        self._channel.receive(message)


class WorkerProcess:
    """A worker process that runs ``target(channel)``; with ``gpu`` it has its own GPU.

    The target is passed to the process only: as an argument of its task, which Ray shows nowhere. An argument
    of the actor would be kept by Ray, and the environment would be visible.
    """

    def __init__(self, target: Callable[[WorkerChannel], None], *, gpu: bool) -> None:
        import ray

        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_concurrency": _MAX_CONCURRENCY,
            "scheduling_strategy": "SPREAD",
        }
        self._actor: Any = ray.remote(_Actor).options(**options, num_gpus=int(gpu)).remote()
        self.events: Any = self._actor.work.options(num_returns="streaming").remote(target)

    def send(self, message: QuotaGranted | Resume | Shutdown) -> None:
        """Send a message to the process, whether or not it still lives."""
        self._actor.receive.remote(message)

    def kill(self) -> None:
        """End the process at once."""
        import ray

        ray.kill(self._actor)


def next_events(processes: Sequence[WorkerProcess], timeout: float) -> Iterator[tuple[WorkerProcess, object]]:
    """Yield the next event of some of the processes, WorkerDied for a dead one; nothing after ``timeout``."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayError

    ready, _ = ray.wait([process.events for process in processes], num_returns=1, timeout=timeout)
    for process in [process for process in processes if process.events in ready]:
        try:
            yield process, ray.get(next(process.events), timeout=timeout)
        except GetTimeoutError:
            continue
        except RayActorError as exc:
            # An actor that could not start (its machine lacks the package, for instance) is not restarted.
            if exc.actor_init_failed:
                yield process, WorkerExited(_start_failure(exc))
            else:
                yield process, WorkerDied(_reason(exc))
        except RayError as exc:
            yield process, WorkerExited(_start_failure(exc))
        except StopIteration:
            yield process, WorkerDied("exited without a status")


def _start_failure(exc: Exception) -> RunFailed:
    return RunFailed(f"a worker could not start: {_reason(exc)}")


def _reason(exc: Exception) -> str:
    """Return one line of Ray's message: the one that gives the reason, if there is such a line."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("The actor is dead because") or "Error: " in line]
    return (reasons[-1:] or lines[:1] or [type(exc).__name__])[0][:300]


@dataclass(frozen=True, slots=True)
class QuotaRequested:
    """The worker wants to claim ``wanted`` more prompts of the run's limit, and waits for QuotaGranted."""

    wanted: int


@dataclass(frozen=True, slots=True)
class WorkerIdle:
    """The worker has found nothing to claim, and waits for Resume."""


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """The worker has ended; ``failure`` is None if it was asked to end, or stopped."""

    failure: Text2ImgError | None = None


@dataclass(frozen=True, slots=True)
class QuotaGranted:
    """The worker may claim ``prompts`` more."""

    prompts: int


@dataclass(frozen=True, slots=True)
class Resume:
    """There may be something to claim; without ``more_work`` there will not be, and the worker ends."""

    more_work: bool = True


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The run was asked to end by this signal."""

    signal: int


class WorkerChannel:
    """The worker's end of the message channel to the run.

    Any thread may use it; events arrive in the order in which they are sent. Shutdown sets ``stop``.
    """

    def __init__(self) -> None:
        self.stop = Stop()
        self._events: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._granted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._resumed: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._quota_lock = threading.Lock()

    def send(self, event: object) -> None:
        """Send an event to the run; never waits."""
        self._events.put(event)

    def request_quota(self, wanted: int) -> int:
        """Return how many of the ``wanted`` prompts are granted. Raises Stopped when the run has to end."""
        with self._quota_lock:
            self.send(QuotaRequested(wanted))
            granted = self._granted.get()
        self.stop.check()
        return granted

    def wait_for_start(self) -> None:
        """Wait until the run has received WorkerStarted. Raises Stopped when the run has to end.

        A worker that claimed earlier and died at once would leave claims under a name that the run has not
        received: nothing would make them available again before their leases expire.
        """
        self._resumed.get()
        self.stop.check()

    def wait_for_work(self) -> bool:
        """Wait until the run resumes this worker; return False if there is no more work.

        Raises Stopped when the run has to end.
        """
        self.send(WorkerIdle())
        more_work = self._resumed.get()
        self.stop.check()
        return more_work

    def receive(self, message: QuotaGranted | Resume | Shutdown) -> None:
        """Take a message of the run."""
        if isinstance(message, QuotaGranted):
            self._granted.put(message.prompts)
        elif isinstance(message, Resume):
            self._resumed.put(message.more_work)
        else:
            self.stop.set(message.signal)
            self._granted.put(0)  # wakes a thread that waits for either message
            self._resumed.put(False)

    def work(self, target: Callable[[WorkerChannel], None]) -> Iterator[object]:
        """Run the target in its own thread; yield the events that are sent, WorkerExited last."""
        threading.Thread(target=self._run, args=(target,), name="worker", daemon=True).start()
        while not isinstance(event := self._events.get(), WorkerExited):
            yield event
        yield event

    def _run(self, target: Callable[[WorkerChannel], None]) -> None:
        failure: Text2ImgError | None = None
        try:
            target(self)
        except Stopped:
            pass  # the run asked for it
        except Text2ImgError as exc:
            failure = exc
        except BaseException as exc:
            log.debug("the worker failed", exc_info=exc)
            first_line = (str(exc).splitlines() or [""])[0]
            failure = RunFailed(
                f"unexpected {type(exc).__name__}: {first_line}; --log-level DEBUG shows where"
            )
        self.send(WorkerExited(failure))


_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}
_LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the only way to make Ray listen on 127.0.0.1 alone
    "RAY_AUTH_MODE": "token",
}
_OBJECT_STORE_BYTES = 80 * 1024 * 1024
"""Bytes of shared memory for objects, close to Ray's minimum: the messages here are small."""
_POLL_INTERVAL = 0.05  # seconds


@dataclass(frozen=True, slots=True)
class Cluster:
    """A Ray cluster: the number of its GPUs, and the addresses of its machines."""

    gpus: int
    machines: frozenset[str]


def check(address: str | None) -> None:
    """Raise ConfigurationError for what cannot work, as far as it is known without a request."""
    if find_spec("ray") is None:
        raise ConfigurationError("--workers needs Ray; pip install 'ray==2.60.0'")
    if address is not None and address.startswith("ray://"):
        raise ConfigurationError(
            "--ray-address (RAY_ADDRESS): ray:// connections are not supported; start the run on a machine of"
            " the cluster (ray job submit)"
        )


def is_here(address: str | None) -> bool:
    """Return True if Ray's address may be this machine's; None (Ray is started here), auto or HOST:PORT."""
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
def ray_cluster(address: str | None) -> Iterator[Cluster]:
    """Start or join Ray; leaving the block ends what was started. Call it from the main thread.

    Raises RunFailed if Ray can be neither started nor joined.
    """
    folder = tempfile.mkdtemp(prefix="text2img-ray-") if address is None else None
    os.environ.update(_ENVIRONMENT)
    if folder is not None:
        os.environ.update(_LOCAL_ENVIRONMENT, RAY_AUTH_TOKEN=secrets.token_hex(32))
    session = _Session(address, folder)
    with redirect_stdout(_StdoutFilter(sys.stdout)):  # also while Ray ends, when it prints the most
        try:
            session.start()
            yield _inspect_cluster()
        finally:
            session.end()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


class _Session:
    """A thread that starts Ray and lives as long as the session.

    The kernel kills the processes that it starts when the thread ends, also if this whole process dies.
    """

    def __init__(self, address: str | None, folder: str | None) -> None:
        self._address, self._folder = address, folder
        self._started, self._closed = threading.Event(), threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="ray_session", daemon=True)

    def start(self) -> None:
        """Start the thread and wait until Ray is available. Raises RunFailed."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        record_factory = logging.getLogRecordFactory()
        self._thread.start()
        started = False
        while not started:
            started = self._started.wait(_POLL_INTERVAL)
            for number, handler in handlers.items():  # Ray installs its own, which abort
                signal.signal(number, handler)
            logging.setLogRecordFactory(record_factory)  # Ray's own marks the records of all loggers
        if self._failure is not None:
            first_line = (str(self._failure).splitlines() or [""])[0]
            problem = f"at {self._address} cannot be joined" if self._address else "does not start"
            reason = first_line or type(self._failure).__name__
            raise RunFailed(f"Ray {problem}: {reason}") from self._failure

    def end(self) -> None:
        """End what was started."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            import ray

            ray.init(**self._options())
        except Exception as exc:  # noqa: BLE001 - it is raised again in the main thread
            self._failure = exc
        finally:
            self._started.set()
        self._closed.wait()
        with suppress(Exception):
            ray.shutdown()

    def _options(self) -> dict[str, Any]:
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address is not None:
            return {"address": self._address, **quiet}
        local = {
            "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
            "_temp_dir": self._folder,
        }
        return {"address": "local", "num_cpus": 1, **local, **quiet}


class _StdoutFilter(io.TextIOBase):
    """Standard output without what Ray's threads (``ray_…``) print, which is logged at DEBUG."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write the text, or log it if one of Ray's threads prints it."""
        if not threading.current_thread().name.startswith("ray_"):
            return self._stream.write(text)
        if text.strip():
            log.debug("Ray: %s", text.strip())
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def fileno(self) -> int:
        """Return the stream's file descriptor."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Return True if the stream is a terminal."""
        return self._stream.isatty()

    def writable(self) -> bool:
        """Return True: the stream is written to."""
        return True


def _inspect_cluster() -> Cluster:
    import ray

    machines = frozenset(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"])
    return Cluster(int(ray.cluster_resources().get("GPU", 0)), machines)
