"""Where prompts stand and what is still to be told, in lines for people. Knows counts, and asks nobody."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from text2img.databases import Counts

Notices = tuple[int, int]
"""How many notices are still to be told, and how many were refused for good."""


def prompts(counts: Counts) -> list[str]:
    """A line for each status."""
    oldest = f"  (oldest {age(counts.oldest_pending)} old)" if counts.oldest_pending else ""
    live, expired = counts.live_leases, counts.expired_leases
    errors = ", ".join(f"{code} {count}" for code, count in sorted(counts.errors.items()))
    return [
        f"pending     {counts.pending:>8,}{oldest}",
        f"processing  {counts.processing:>8,}  (leases: {live:,} live, {expired:,} expired)",
        f"completed   {counts.completed:>8,}",
        f"error       {counts.error:>8,}" + (f"  ({errors})" if errors else ""),
    ]


def told(counts: Counts, receivers: Notices, own: Notices) -> list[str]:
    """What the callback's receiver is still to be told, and prompts' own webhooks, where there are any."""
    lines = [_told("untold", counts.untold, "callbacks", receivers)]
    if counts.owed or any(own):
        lines.append(_told("webhooks", counts.owed, "notices", own))
    return lines


def age(moment: datetime) -> str:
    """How long ago, in its largest unit."""
    return length((datetime.now(UTC) - moment).total_seconds())


def length(seconds: float) -> str:
    """So many seconds in their largest unit; less than none are none."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _told(what: str, outcomes: int, kind: str, notices: Notices) -> str:
    due, refused = notices
    return f"{what:<11} {outcomes:>8,}  ({kind}: {due:,} still to be told, {refused:,} refused for good)"
