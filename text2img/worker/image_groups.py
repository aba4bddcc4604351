"""Prompts that have several pictures: what became of each waits here for the others, to be one outcome.

Knows outcomes; stores and records nothing.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from text2img.prompts import Completed
from text2img.prompts.refinement import worst

if TYPE_CHECKING:
    from collections.abc import Sequence

    from text2img.prompts import Claim, Outcome, Request
    from text2img.prompts.refinement import Loop


class Albums:
    """The pictures so far of each claim that has not got all of its own. Safe to use from several threads.

    With a ``loop`` they are candidates, of which it keeps the best.
    """

    def __init__(self, loop: Loop | None = None) -> None:
        self._loop = loop
        self._open: dict[Claim, list[Outcome | None]] = {}
        self._lock = threading.Lock()

    def add(self, request: Request, became: Outcome | None) -> Outcome | None:
        """The prompt's outcome, if all of its pictures have been added now; else None.

        ``became`` is what the prompt would be with this picture alone; None: there is no picture, since the
        claim is lost or another of the prompt's pictures failed. Each picture has to be added once.
        """
        claim = request.prompt.claim
        with self._lock:
            pictures = self._open.setdefault(claim, [])
            pictures.append(became)
            if len(pictures) < request.pictures:
                return None
            del self._open[claim]
        return _together(pictures) if self._loop is None else self._loop.settle(request, pictures)

    def spoilt(self, claim: Claim) -> bool:
        """Whether a picture of the claim is missing for good: the others would be made for nothing."""
        with self._lock:
            pictures = self._open.get(claim, ())
        if self._loop is not None:
            return None in pictures
        return not all(isinstance(became, Completed) for became in pictures)


def _together(pictures: Sequence[Outcome | None]) -> Outcome | None:
    """One failure is the prompt's, first of all one for good; with a claim that is lost there is nothing."""
    if failed := worst(pictures):
        return failed
    done = [became for became in pictures if isinstance(became, Completed)]
    if len(done) < len(pictures):
        return None
    stored = sorted((each for one in done for each in one.pictures), key=lambda each: each.number)
    return replace(done[0], pictures=tuple(stored))
