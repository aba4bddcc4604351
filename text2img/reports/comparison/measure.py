"""Looks at the pictures of many pairs, a few at once. Knows no storage: whoever asks says how to read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from text2img.reports.comparison.similarity import likeness

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from text2img.reports.comparison import Pair

_AT_ONCE: Final = 4
"""Pictures are decoded and compared on few cores, and read over the network in between."""
_One = TypeVar("_One")
_Other = TypeVar("_Other")


def looked_at(
    pairs: Sequence[Pair],
    read: Callable[[str], bytes],
    clip: Callable[[NDArray[np.uint8], NDArray[np.uint8]], float] | None,
) -> tuple[Pair, ...]:
    """The pairs, each with how alike its pictures are; ``read`` gives the bytes that a URL means, or raises
    Unreadable, from several threads at once; ``clip`` as ``likeness`` takes it.
    """

    def look(pair: Pair) -> Pair:
        both = partial(read, pair.a.url), partial(read, pair.b.url)
        return replace(pair, likeness=likeness(both, clip))

    return tuple(in_parallel(look, pairs))


def in_parallel(function: Callable[[_One], _Other], items: Iterable[_One]) -> Iterator[_Other]:
    """What the function makes of each item, in their order; whoever stops asking leaves nothing waiting."""
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        yield from pool.map(function, items)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
