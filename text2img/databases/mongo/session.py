"""An open MongoDB database: the client, the collections, and how they are opened and closed.

Knows nothing of what is done with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pymongo

from text2img.databases.mongo.connection import address_of, connect, database_of, reported
from text2img.databases.mongo.indexes import INDEXES, make

if TYPE_CHECKING:
    from pymongo.collection import Collection

    from text2img.databases import Collections
    from text2img.databases.mongo.connection import Document


_PARTING: Final = 1
"""Seconds for the server to hear that the sessions are over: it forgets them by itself."""


class Session:
    """The collections of one database, by a MongoDB URI whose path names it.

    Raises ConfigurationError for a URI that cannot be read. pymongo's client is safe to share by threads.
    """

    def __init__(self, uri: str, collections: Collections) -> None:
        self._names = collections
        self._client = connect(uri)
        self._database = database_of(self._client)
        self.address = address_of(uri)
        self.name = self._database.name
        self.datasets = self._collection(collections.datasets)
        self.records = self._collection(collections.dataset_records)
        self.configurations = self._collection(collections.model_configs)
        self.runs = self._collection(collections.runs)
        self.callbacks = self._collection(collections.callbacks)

    @reported
    def open(self, *, create: bool = True) -> None:
        """Reach the server and, with ``create``, make the indexes; may be repeated. Raises DatabaseFailed."""
        # A look into the database, and no ping, which a server answers to those it would let do nothing.
        self.datasets.find_one({}, {"_id": 1})
        for index in INDEXES if create else ():
            make(index, self._collection(getattr(self._names, index.of)), self._names)

    def close(self) -> None:
        """Let go of the connections; may be repeated."""
        with pymongo.timeout(_PARTING):
            self._client.close()

    def _collection(self, name: str) -> Collection[Document]:
        return self._database[name]
