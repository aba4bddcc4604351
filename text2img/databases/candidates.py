"""The tries of a prompt's loop, as they stand in its document and in its result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from text2img.prompts import Stored
from text2img.prompts.outcomes import Evaluation

if TYPE_CHECKING:
    from collections.abc import Sequence


def documents_of(tries: Sequence[Stored], best: Stored | None) -> list[dict[str, object]]:
    """What is recorded of the tries, in their order; the ``best``, once it is known, says that it is."""
    return [_document_of(each, best=each is best) for each in tries]


def tries_of(value: object) -> tuple[Stored, ...]:
    """The tries that a prompt's document holds, for its loop to go on with: none of a loop that has ended,
    since its owner wants the prompt made anew, and none where anything in it is not as it was recorded:
    another program may have been there.
    """
    if not isinstance(value, list):
        return ()
    try:
        return () if any("best" in each for each in value) else tuple(_try_of(each) for each in value)
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


def _document_of(one: Stored, *, best: bool) -> dict[str, object]:
    document: dict[str, object] = {
        "iteration": one.iteration,
        "number": one.number,
        "prompt": one.text,
        "seed": one.used.get("seed"),
        "image_url": one.image_url,
        "sha256": one.sha256,
        "truncated": one.truncated,
        "used": dict(one.used),
    }
    if one.evaluation is not None:
        document |= {"score": one.score, "evaluation": one.evaluation.document}
    return document | ({"best": True} if best else {})


def _try_of(document: dict[str, Any]) -> Stored:
    texts = {"text": document["prompt"], "image_url": document["image_url"], "sha256": document["sha256"]}
    counts = {name: document[name] for name in ("iteration", "number")}
    if not all(isinstance(text, str) for text in texts.values()):
        raise TypeError("a text is none")
    if not all(type(count) is int and 0 <= count < 1_000_000 for count in counts.values()):
        raise TypeError("a count is none")
    seen = document.get("evaluation")
    return Stored(
        **texts,
        **counts,
        used=dict(document["used"]),
        truncated=document["truncated"] is True,
        evaluation=None if seen is None else Evaluation.of(seen),
    )
