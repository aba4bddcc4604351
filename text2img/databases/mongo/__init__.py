"""Prompts and results in MongoDB, 4.4 or later. The contract is that of text2img.databases.

The only place that knows pymongo and BSON; it is imported when a MongoDB URL is opened.
"""

from __future__ import annotations

from text2img.databases.mongo.outbox import MongoOutbox
from text2img.databases.mongo.queue import MongoQueue
from text2img.databases.mongo.run_store import MongoResults, MongoRunStore

__all__ = ["MongoDatabase"]


class MongoDatabase(MongoQueue, MongoOutbox, MongoRunStore, MongoResults):
    """A MongoDB database by its URI; whatever may be asked of it stands in text2img.databases.Database.

    ``open`` must come first; raises ConfigurationError for a URI that cannot be read.
    """
