"""What was worked out once and is wanted again: tensors by key, within a bound of bytes.

Knows nothing of texts: whoever asks says what the key is and how to make what it stands for.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    Tensors = tuple[Any, ...]


class Remembered:
    """Tuples of tensors (or None), of which the least recently used go beyond ``room`` bytes in all.

    Used from one thread at a time; nobody may change the tensors.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._known: OrderedDict[Hashable, Tensors] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable, make: Callable[[], Tensors]) -> Tensors:
        """What is known by ``key``, else what ``make`` gives."""
        if key not in self._known:
            made = self._known[key] = make()
            self._bytes += _size(made)
        self._known.move_to_end(key)
        found = self._known[key]
        while self._bytes > self._room:
            _, oldest = self._known.popitem(last=False)
            self._bytes -= _size(oldest)
        return found


def _size(tensors: Tensors) -> int:
    return sum(one.nbytes for one in tensors if one is not None)
