"""The one line that a run ends with: how many, how fast, where the time went, where the pictures are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from text2img.telemetry.stats import DEVICE_STAGES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from text2img.databases import Counts
    from text2img.telemetry.stats import Tally


def last_line(
    tally: Tally, spent: Mapping[str, float], remaining: str, cost: float | None, place: str
) -> str:
    """The line; ``spent`` in seconds by stage, ``cost`` in dollars for 1,000 images, ``place`` the storage's
    URL.
    """
    several = f" ({tally.pictures} pictures)" if tally.pictures != tally.completed else ""
    done = f"completed {tally.completed}{several}, failed {tally.failed}, remaining {remaining}"
    score = [] if tally.score is None else [f"mean score {tally.score:.2f}"]
    pace = f"{tally.images_per_second:.2f} images/s"
    priced = [] if cost is None else [dollars(cost)]
    return "; ".join([done, *score, pace, *_where_time_went(tally, spent), *priced, place])


def dollars(cost: float) -> str:
    """What 1,000 images cost, as people read it; less than a dollar to a hundredth of a cent."""
    return f"${cost:,.2f} per 1,000 images" if cost >= 1 else f"${cost:.4f} per 1,000 images"


def remaining(left: Counts, later: int) -> str:
    """How many remain, of which ``later`` wait for their next try, and how many others work on."""
    waits = f" ({later} to be tried again later)" if later else ""
    others = f", {left.processing} with other workers" if left.processing else ""
    return f"{left.pending}{waits}{others}"


def _where_time_went(tally: Tally, spent: Mapping[str, float]) -> list[str]:
    """What the device's thread spent most of the run on; nothing for a run that made nothing."""
    if not tally.made:
        return []
    whole = tally.seconds
    most = [f"{stage} {spent[stage]:.1f}" for stage in DEVICE_STAGES if spent.get(stage, 0) >= whole / 100]
    busy = f"device busy {100 * tally.device_busy:.0f} % between first and last batch"
    return [f"{whole:.1f} s: {', '.join(most)}", busy]
