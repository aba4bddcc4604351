"""Prompts that have several pictures: what became of each waits here for the others, to be one outcome.

Knows outcomes; stores and records nothing.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from text2img.prompts import Completed, Failed, Postponed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from text2img.prompts import Claim, Outcome, Request


class Albums:
    """The pictures so far of each claim that has not got all of its own. Safe to use from several threads."""

    def __init__(self) -> None:
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
            if len(pictures) < request.parameters.num_images:
                return None
            del self._open[claim]
        return _together(pictures)

    def spoilt(self, claim: Claim) -> bool:
        """Whether a picture of the claim is missing for good: the others would be made for nothing."""
        with self._lock:
            return not all(isinstance(became, Completed) for became in self._open.get(claim, ()))


def _together(pictures: Sequence[Outcome | None]) -> Outcome | None:
    """One failure is the prompt's, first of all one for good; with a claim that is lost there is nothing."""
    for kind in (Failed, Postponed):
        for became in pictures:
            if isinstance(became, kind):
                return became
    done = [became for became in pictures if isinstance(became, Completed)]
    if len(done) < len(pictures):
        return None
    stored = sorted((each for one in done for each in one.pictures), key=lambda each: each.number)
    return replace(done[0], pictures=tuple(stored))
