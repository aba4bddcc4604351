"""What a finished prompt's document says to whoever looks at it later, for every adapter. Knows no database.

Whatever another program may have left in a field is read as far as it goes, and else as if it were not there.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from text2img.databases import Failure, Made
from text2img.databases.documents import count_of, drawn_text, object_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from text2img.prompts import PromptId

_BOTH: Final = ("text", "prompt_tags", "run_id")
MADE_FIELDS: Final = (
    *(*_BOTH, "image_url", "image_urls", "completed_at", "used"),
    *("score", "scores", "evaluation", "iterations", "tries"),
)
FAILURE_FIELDS: Final = (*_BOTH, "error", "error_code", "error_at", "attempts")


def made_of(prompt_id: PromptId, dataset_id: str | None, fields: Mapping[str, Any]) -> Made:
    """A completed prompt; moments in time are datetimes, objects and lists are that."""
    iterations = count_of(fields.get("iterations"))
    return Made(
        id=prompt_id,
        text=_drawn(fields),
        dataset_id=dataset_id,
        run_id=_text(fields.get("run_id")),
        image_urls=_urls(fields),
        completed_at=_moment(fields.get("completed_at")),
        used=object_of(fields.get("used")),
        scores=_scores(fields),
        evaluation=object_of(fields.get("evaluation")),
        iterations=iterations or None,
        tries=tuple(each for each in _list(fields.get("tries")) if isinstance(each, dict)),
    )


def failure_of(prompt_id: PromptId, dataset_id: str | None, fields: Mapping[str, Any]) -> Failure:
    """A prompt that failed for good."""
    return Failure(
        id=prompt_id,
        text=_drawn(fields),
        dataset_id=dataset_id,
        run_id=_text(fields.get("run_id")),
        code=_text(fields.get("error_code")) or "",
        sentence=_text(fields.get("error")) or "",
        attempts=count_of(fields.get("attempts")),
        failed_at=_moment(fields.get("error_at")),
    )


def _urls(fields: Mapping[str, Any]) -> tuple[str, ...]:
    several = [url for url in _list(fields.get("image_urls")) if isinstance(url, str)]
    first = _text(fields.get("image_url"))
    return tuple(several or ([first] if first else []))


def _scores(fields: Mapping[str, Any]) -> tuple[float | None, ...]:
    several = _list(fields.get("scores"))
    if not several and fields.get("score") is not None:
        several = [fields["score"]]
    return tuple(map(_score, several))


def _score(value: object) -> float | None:
    """A number in [0, 1]; whatever is none is no score."""
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if numeric and 0 <= value <= 1 else None  # type: ignore[operator, arg-type]


def _drawn(fields: Mapping[str, Any]) -> str:
    text = drawn_text(fields)
    return text if isinstance(text, str) else "" if text is None else str(text)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _moment(value: object) -> datetime | None:
    return value if isinstance(value, datetime) else None
