"""The indexes that the job needs, each with what it serves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from pymongo import ASCENDING, DESCENDING
from pymongo.errors import DuplicateKeyError

from text2img.databases.documents import OWED
from text2img.errors import DatabaseFailed

if TYPE_CHECKING:
    from pymongo.collection import Collection

    from text2img.databases import Collections


@dataclass(frozen=True, slots=True)
class Index:
    """An index on ``keys`` of the collection that Collections knows by ``of``."""

    of: str
    name: str
    keys: tuple[tuple[str, int], ...]
    options: dict[str, Any] = field(default_factory=dict)


_IN_ORDER = (("status", ASCENDING), ("priority", DESCENDING), ("_id", ASCENDING))
INDEXES: Final = (
    Index("datasets", "text2img_claim", _IN_ORDER),
    Index("datasets", "text2img_claim_of_dataset", (("dataset_id", ASCENDING), *_IN_ORDER)),
    Index(
        "datasets",
        "text2img_untold",
        (("untold", ASCENDING), ("run_id", ASCENDING)),
        {"partialFilterExpression": {"untold": {"$exists": True}}},
    ),
    Index(
        "datasets",
        "text2img_owed",
        ((OWED, ASCENDING),),
        {"partialFilterExpression": {OWED: {"$exists": True}}},
    ),
    Index(
        "dataset_records",
        "text2img_result",
        (("dataset_id", ASCENDING),),
        {"unique": True, "sparse": True},  # sparse: other programs' documents without a dataset_id may stay
    ),
    Index("callbacks", "text2img_due", (("state", ASCENDING), ("created_at", ASCENDING))),
    Index("runs", "text2img_latest", (("started_at", DESCENDING),)),
)


def make(index: Index, collection: Collection[dict[str, Any]], collections: Collections) -> None:
    """Make the index unless one that serves as well is there: then no right to make one is needed.

    Raises DatabaseFailed where results stand there twice; other errors are pymongo's.
    """
    if _is_there(index, collection):
        return
    try:
        collection.create_index(list(index.keys), name=index.name, **index.options)
    except DuplicateKeyError as exc:
        raise DatabaseFailed(
            f"{collections.dataset_records} holds several results with the same dataset_id, and only one for "
            "each prompt may be kept; remove the surplus ones, or name another collection"
        ) from exc


def _is_there(index: Index, collection: Collection[dict[str, Any]]) -> bool:
    """Whether an index on the same keys, as unique, is there under whatever name.

    One that is not sparse is stricter where it is unique, and so does as well.
    """
    return any(
        tuple(known["key"]) == index.keys
        and bool(known.get("unique")) >= bool(index.options.get("unique"))
        and bool(known.get("sparse")) <= bool(index.options.get("sparse"))
        and known.get("partialFilterExpression") == index.options.get("partialFilterExpression")
        for known in collection.index_information().values()
    )
