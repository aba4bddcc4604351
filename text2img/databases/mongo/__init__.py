"""Prompts and results in MongoDB 4.4 or later, through the Protocols of text2img.databases.

Only this package uses pymongo and BSON; it is imported when a MongoDB URL is opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from text2img.databases import Database
from text2img.databases.mongo.outbox import MongoOutbox
from text2img.databases.mongo.queue import MongoQueue
from text2img.databases.mongo.run_store import MongoResults, MongoRunStore
from text2img.databases.mongo.session import Session

if TYPE_CHECKING:
    from text2img.databases import Collections

__all__ = ["mongo_database"]


def mongo_database(uri: str, collections: Collections) -> Database:
    """Return the database of a MongoDB URI, not connected yet; raise ConfigurationError if it is invalid."""
    session = Session(uri, collections)
    return Database(
        connection=session,
        queue=MongoQueue(session),
        outbox=MongoOutbox(session),
        runs=MongoRunStore(session),
        results=MongoResults(session),
    )
