"""The processes that work for a run: started, told, heard, and missed when they die. Knows no prompts."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from text2img.errors import RunFailed
from text2img.worker.ray.channel import Ended, Line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from text2img.worker.ray.channel import End, GoOn, Granted

log = logging.getLogger(__name__)

_AT_ONCE = 4  # calls that a process answers at once: its labour, and what it is told meanwhile


@dataclass(frozen=True, slots=True)
class Died:
    """The process is gone, without having ended; ``reason`` is Ray's."""

    reason: str


class _Actor:
    """What Ray runs in a process of its own."""

    def __init__(self) -> None:
        self._line = Line()

    def work(self, labour: Callable[[Line], None]) -> Iterator[object]:
        """See Line.work."""
        yield from self._line.work(labour)

    def tell(self, word: Granted | GoOn | End) -> None:
        """See Line.tell."""
        self._line.tell(word)


class Seat:
    """One process, which does ``labour(line)``; with ``gpu`` it has a GPU to itself.

    The labour goes to the process alone: as an argument of its task, which Ray shows nowhere, and neither as
    an argument of the actor's, which Ray would keep, nor by the environment.
    """

    def __init__(self, labour: Callable[[Line], None], *, gpu: bool) -> None:
        import ray

        options: dict[str, Any] = {
            "num_cpus": 0,
            "max_concurrency": _AT_ONCE,
            "scheduling_strategy": "SPREAD",
        }
        self._actor: Any = ray.remote(_Actor).options(**options, num_gpus=int(gpu)).remote()
        self.said: Any = self._actor.work.options(num_returns="streaming").remote(labour)

    def tell(self, word: Granted | GoOn | End) -> None:
        """Tell its process, whether it still lives or not."""
        self._actor.tell.remote(word)

    def leave(self) -> None:
        """End the process, at once."""
        import ray

        ray.kill(self._actor)


def listen(seats: Sequence[Seat], seconds: float) -> Iterator[tuple[Seat, object]]:
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
            yield seat, Ended(_never_began(exc)) if never else Died(_why(exc))
        except RayError as exc:
            yield seat, Ended(_never_began(exc))
        except StopIteration:
            yield seat, Died("it ended without a word")


def _never_began(exc: Exception) -> RunFailed:
    return RunFailed(f"a worker could not begin: {_why(exc)}")


def _why(exc: Exception) -> str:
    """One line of Ray's many: the one that gives the reason, where there is such a line."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("The actor is dead because") or "Error: " in line]
    return (reasons[-1:] or lines[:1] or [type(exc).__name__])[0][:300]
