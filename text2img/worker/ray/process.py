"""The processes that work for a run: started, told, heard, and missed when they die. Knows no prompts."""

from __future__ import annotations

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

_AT_ONCE = 4  # calls that a process answers at once: its labour, and what it is told meanwhile


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """The process is gone, without having ended; ``reason`` is Ray's."""

    reason: str


class _Actor:
    """What Ray runs in a process of its own."""

    def __init__(self) -> None:
        self._line = WorkerChannel()

    def work(self, executor: Callable[[WorkerChannel], None]) -> Iterator[object]:
        """See Line.work."""
        yield from self._line.work(executor)

    def tell(self, word: QuotaGranted | Resume | Shutdown) -> None:
        """See Line.tell."""
        self._line.tell(word)


class WorkerProcess:
    """One process, which does ``labour(line)``; with ``gpu`` it has a GPU to itself.

    The labour goes to the process alone: as an argument of its task, which Ray shows nowhere, and neither as
    an argument of the actor's, which Ray would keep, nor by the environment.
    """

    def __init__(self, executor: Callable[[WorkerChannel], None], *, gpu: bool) -> None:
        import ray

        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_concurrency": _AT_ONCE,
            "scheduling_strategy": "SPREAD",
        }
        self._actor: Any = ray.remote(_Actor).options(**options, num_gpus=int(gpu)).remote()
        self.said: Any = self._actor.work.options(num_returns="streaming").remote(executor)

    def tell(self, word: QuotaGranted | Resume | Shutdown) -> None:
        """Tell its process, whether it still lives or not."""
        self._actor.tell.remote(word)

    def leave(self) -> None:
        """End the process, at once."""
        import ray

        ray.kill(self._actor)


def listen(seats: Sequence[WorkerProcess], seconds: float) -> Iterator[tuple[WorkerProcess, object]]:
    """What some of the seats say next, Died for one whose process is gone; nothing after ``seconds``."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayError

    ready, _ = ray.wait([seat.said for seat in seats], num_returns=1, timeout=seconds)
    for seat in [seat for seat in seats if seat.said in ready]:
        try:
            yield seat, ray.get(next(seat.said), timeout=seconds)
        except GetTimeoutError:
            continue
        except RayActorError as exc:
            never = exc.actor_init_failed  # its machine lacks the package, say: another process would as well
            yield seat, WorkerExited(_never_began(exc)) if never else WorkerDied(_why(exc))
        except RayError as exc:
            yield seat, WorkerExited(_never_began(exc))
        except StopIteration:
            yield seat, WorkerDied("it ended without a word")


def _never_began(exc: Exception) -> RunFailed:
    return RunFailed(f"a worker could not begin: {_why(exc)}")


def _why(exc: Exception) -> str:
    """One line of Ray's many: the one that gives the reason, where there is such a line."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("The actor is dead because") or "Error: " in line]
    return (reasons[-1:] or lines[:1] or [type(exc).__name__])[0][:300]


@dataclass(frozen=True, slots=True)
class QuotaRequested:
    """The worker wants to claim so many more of the run's limit, and waits for ``Granted``."""

    wanted: int


@dataclass(frozen=True, slots=True)
class WorkerIdle:
    """The worker has found nothing to claim, and waits for ``GoOn``."""


@dataclass(frozen=True, slots=True)
class WorkerExited:
    """The worker has ended: ``failure`` is why, None where it was told to, or stopped."""

    failure: Text2ImgError | None = None


@dataclass(frozen=True, slots=True)
class QuotaGranted:
    """So many more may be claimed."""

    prompts: int


@dataclass(frozen=True, slots=True)
class Resume:
    """There may be something to claim; not ``further``: there will not be."""

    further: bool = True


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The run was asked to end by this signal."""

    signal: int


class WorkerChannel:
    """What a worker says, in its order, and what it is told, from any thread. ``End`` sets ``stop``."""

    def __init__(self) -> None:
        self.stop = Stop()
        self._said: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._granted: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._told: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._asking = threading.Lock()

    def say(self, event: object) -> None:
        """Let the run know; never waits."""
        self._said.put(event)

    def ask(self, wanted: int) -> int:
        """So many of the ``wanted`` prompts are granted. Raises Stopped when the run is asked to end."""
        with self._asking:
            self.say(QuotaRequested(wanted))
            granted = self._granted.get()
        self.stop.check()
        return granted

    def rest(self) -> bool:
        """Wait, idle, until told to go on; False: to end. Raises Stopped when the run is asked to end."""
        self.say(WorkerIdle())
        further = self._told.get()
        self.stop.check()
        return further

    def tell(self, word: QuotaGranted | Resume | Shutdown) -> None:
        """The run tells the worker."""
        if isinstance(word, QuotaGranted):
            self._granted.put(word.prompts)
        elif isinstance(word, Resume):
            self._told.put(word.further)
        else:
            self.stop.set(word.signal)
            self._granted.put(0)  # whoever waits shall see it
            self._told.put(False)

    def work(self, executor: Callable[[WorkerChannel], None]) -> Iterator[object]:
        """Do the labour in a thread of its own; all that is said meanwhile, and ``Ended`` at the last."""
        threading.Thread(target=self._work, args=(executor,), name="labour", daemon=True).start()
        while not isinstance(event := self._said.get(), WorkerExited):
            yield event
        yield event

    def _work(self, executor: Callable[[WorkerChannel], None]) -> None:
        failure: Text2ImgError | None = None
        try:
            executor(self)
        except Stopped:
            pass  # who stopped it knows
        except Text2ImgError as exc:
            failure = exc
        except BaseException as exc:
            log.debug("the worker failed", exc_info=exc)
            first = (str(exc).splitlines() or [""])[0]
            failure = RunFailed(f"unexpected {type(exc).__name__}: {first}; --log-level DEBUG shows where")
        self.say(WorkerExited(failure))


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
    with redirect_stdout(_StdoutFilter(sys.stdout)):  # also while Ray ends: it has most to say then
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


class _StdoutFilter:
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
