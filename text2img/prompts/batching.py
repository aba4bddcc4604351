"""Which of the claimed requests go to the device next, together.

A batch costs nearly the same whether it is full or not, so full ones go first; a request that has been
passed over too often goes next in whatever company it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from text2img.prompts import Request
    from text2img.prompts.batch_size import Sizes

_AHEAD: Final = 6
"""How many batches' worth of requests may wait to find company. Twenty shapes at random then still make
batches of five or six out of ten."""


class Batcher:
    """Requests that wait for the device, in the order in which they came.

    ``patience`` is how many batches may overtake a request that could have gone with a smaller one.
    """

    def __init__(self, sizes: Sizes, patience: int = 4) -> None:
        self._sizes = sizes
        self._patience = patience
        self._waiting: list[Request] = []
        self._overtaken = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, requests: Iterable[Request]) -> None:
        """Let them wait behind those that wait already."""
        self._waiting.extend(requests)

    def ready(self) -> bool:
        """Whether to take a batch now: a full one is there, or enough wait, or somebody waits long enough."""
        if not self._waiting:
            return False
        enough = len(self._waiting) >= _AHEAD * self._sizes.usual or self._overtaken >= self._patience
        return enough or any(len(group) >= self._size(group) for group in self._groups())

    def take(self) -> list[Request]:
        """The next batch, of one shape and at most of its size; empty when nothing waits."""
        groups = self._groups()
        if not groups:
            return []
        oldest = groups[0]
        chosen = next((group for group in groups if len(group) >= self._size(group)), oldest)
        if self._overtaken >= self._patience:
            chosen = oldest
        self._overtaken = 0 if chosen is oldest else self._overtaken + 1
        batch = chosen[: self._size(chosen)]
        taken = {id(request) for request in batch}
        self._waiting = [request for request in self._waiting if id(request) not in taken]
        return batch

    def _size(self, group: list[Request]) -> int:
        return self._sizes.of(group[0])

    def _groups(self) -> list[list[Request]]:
        """Those that wait, by shape; the groups stand in the order of their oldest member."""
        groups: dict[tuple[object, ...], list[Request]] = {}
        for request in self._waiting:
            groups.setdefault(request.shape, []).append(request)
        return list(groups.values())
