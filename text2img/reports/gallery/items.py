"""Finished prompts and runs as the page's script reads them: plain JSON, nothing trusted, nothing endless."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from text2img.databases.documents import number_of, state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from text2img.databases import Failure, Made, Run

_LONGEST: Final = 10_000
"""Characters of a text that are shown."""
_MANY: Final = 100
"""Members of an object or list that are shown, pictures and tries as well."""
_DEEPEST: Final = 4

Picture = dict[str, Any]


def item_of_made(made: Made, picture: Callable[[str], Picture]) -> dict[str, Any]:
    """A completed prompt. ``picture(url)`` says what is to be shown of one of its pictures."""
    item = {
        **_of(made.id, made.text, made.dataset_id, made.run_id),
        "at": _moment(made.completed_at),
        "pictures": [picture(url) for url in made.image_urls[:_MANY]],
        "used": plain(made.used),
    }
    if any(score is not None for score in made.scores):
        item["scores"] = plain(made.scores)
    if made.evaluation:
        item["evaluation"] = plain(made.evaluation)
    if made.iterations:
        item["iterations"] = made.iterations
    if made.tries:
        item["tries"] = [_try(each, picture) for each in made.tries[:_MANY]]
    return item


def item_of_failure(failure: Failure) -> dict[str, Any]:
    """A prompt that failed for good; whatever has a ``code`` is one."""
    return {
        **_of(failure.id, failure.text, failure.dataset_id, failure.run_id),
        "at": _moment(failure.failed_at),
        "code": plain(failure.code),
        "sentence": plain(failure.sentence),
        "attempts": failure.attempts,
    }


def run_item(run: Run) -> dict[str, Any]:
    """A run's figures; ``dollars`` are those of a thousand images, None where nobody said a price."""
    return {
        "id": plain(run.id),
        "started": _moment(run.started_at),
        "finished": _moment(run.finished_at),
        "status": plain(state_of(run)),
        "model": plain(run.model) if run.model else None,
        "host": plain(run.host),
        "completed": run.completed,
        "failed": run.failed,
        "images": run.images,
        "pace": run.images_per_second,
        "steady": run.steady_images_per_second,
        "busy": run.device_busy,
        "memory": run.peak_memory,
        "dollars": run.dollars_per_1000_images,
        "seconds": {plain(str(name)): number_of(seconds) for name, seconds in _first(run.seconds.items())},
    }


def plain(value: object, depth: int = 0) -> Any:
    """The value as JSON can say it: what is longer, deeper or of another kind than it should be is cut, or
    becomes text.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if math.isfinite(value) and abs(value) < 2**53 else str(value)
    if isinstance(value, dict) and depth < _DEEPEST:
        return {plain(str(name)): plain(each, depth + 1) for name, each in _first(value.items())}
    if isinstance(value, list | tuple) and depth < _DEEPEST:
        return [plain(each, depth + 1) for each in _first(value)]
    text = value if isinstance(value, str) else _moment(value) if isinstance(value, datetime) else str(value)
    return text if text is None or len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _of(prompt_id: object, text: str, dataset: str | None, run: str | None) -> dict[str, Any]:
    return {"id": plain(str(prompt_id)), "text": plain(text), "dataset": plain(dataset), "run": plain(run)}


def _try(each: Mapping[str, object], picture: Callable[[str], Picture]) -> dict[str, Any]:
    url = each.get("image_url")
    shown = {name: plain(each[name]) for name in ("iteration", "seed", "score", "prompt") if name in each}
    pictured = {"picture": picture(url)} if isinstance(url, str) and url else {}
    return {**shown, **pictured, "best": each.get("best") is True}


def _first(members: Iterable[Any]) -> list[Any]:
    return [each for each, _ in zip(members, range(_MANY), strict=False)]


def _moment(moment: datetime | None) -> str | None:
    try:
        return None if moment is None else moment.astimezone(UTC).isoformat(timespec="seconds")
    except OverflowError:  # a moment of the year 1 or 9999, in another zone's time
        return None
