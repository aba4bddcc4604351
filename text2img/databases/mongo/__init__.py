"""Prompts and results in MongoDB 4.4 or later, through the Protocols of text2img.databases.

Only this package uses pymongo and BSON; it is imported when a MongoDB URL is opened.
"""

from __future__ import annotations

from text2img.databases.mongo.outbox import MongoOutbox
from text2img.databases.mongo.queue import MongoQueue
from text2img.databases.mongo.run_store import MongoResults, MongoRunStore

__all__ = ["MongoDatabase"]


class MongoDatabase(MongoQueue, MongoOutbox, MongoRunStore, MongoResults):
    """A MongoDB database, given by its URI; see text2img.databases.Database for its methods.

    Call ``open`` first. Raises ConfigurationError for an invalid URI.
    """
