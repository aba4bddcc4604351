"""What waits in the database, by a few looks that its indexes serve. Knows no metrics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from text2img.databases import Database, Selection

RECEIVERS = {"callback": False, "webhooks": True}
"""Who is told, and whether these are prompts' own webhooks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """Prompts of the selection that can be claimed now or later, claims, and what is still to be told.

    ``untold`` outcomes are in no notice yet; ``notices`` are kept and not told, ``refused`` told of no more.
    """

    claimable: int
    postponed: int
    workers: int
    expired: int
    untold: Mapping[str, int]
    notices: Mapping[str, int]
    refused: Mapping[str, int]


def look(database: Database, selection: Selection) -> Backlog:
    """How it stands; raises DatabaseFailed."""
    holdings = database.holdings(selection)
    notices = {name: database.notices(webhooks=own) for name, own in RECEIVERS.items()}
    return Backlog(
        claimable=database.pending(selection),
        postponed=database.postponed(selection),
        workers=sum(each.prompts > each.expired for each in holdings),
        expired=sum(each.expired for each in holdings),
        untold={name: database.untold(webhooks=own) for name, own in RECEIVERS.items()},
        notices={name: due for name, (due, _) in notices.items()},
        refused={name: refused for name, (_, refused) in notices.items()},
    )
