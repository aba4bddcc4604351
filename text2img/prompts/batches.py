"""Which of the claimed requests go to the device next, together.

A batch costs nearly the same whether it is full or not, so full ones go first; a request that has been
passed over too often goes next in whatever company it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from text2img.prompts import Request


class Batcher:
    """Requests that wait for the device, in the order in which they came.

    ``size`` is the largest batch; ``patience`` how many batches may overtake a request that could have
    gone with a smaller one.
    """

    def __init__(self, size: int, patience: int = 4) -> None:
        self.size = size
        self._patience = patience
        self._waiting: list[Request] = []
        self._overtaken = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, requests: Iterable[Request]) -> None:
        """Let them wait behind those that wait already."""
        self._waiting.extend(requests)

    def full(self) -> bool:
        """Whether a full batch can be taken, or one must be because somebody has waited long enough."""
        return self._overtaken >= self._patience or any(
            len(group) >= self.size for group in self._groups().values()
        )

    def take(self) -> list[Request]:
        """The next batch, at most ``size`` requests of one shape; empty when nothing waits."""
        groups = list(self._groups().values())
        if not groups:
            return []
        oldest = groups[0]
        chosen = next((group for group in groups if len(group) >= self.size), oldest)
        if self._overtaken >= self._patience:
            chosen = oldest
        self._overtaken = 0 if chosen is oldest else self._overtaken + 1
        batch = chosen[: self.size]
        taken = {id(request) for request in batch}
        self._waiting = [request for request in self._waiting if id(request) not in taken]
        return batch

    def drain(self) -> list[Request]:
        """Everything that waits, which then waits no more."""
        waiting, self._waiting = self._waiting, []
        return waiting

    def _groups(self) -> dict[tuple[object, ...], list[Request]]:
        """Those that wait, by shape; the groups stand in the order of their oldest member."""
        groups: dict[tuple[object, ...], list[Request]] = {}
        for request in self._waiting:
            groups.setdefault(request.shape, []).append(request)
        return groups
