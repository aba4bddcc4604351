"""A connection to MongoDB: the client, the collections with their indexes, and errors in one line."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

import pymongo
from bson.errors import BSONError
from pymongo import ASCENDING, DESCENDING, MongoClient, ReadPreference, WriteConcern
from pymongo.errors import (
    AutoReconnect,
    DuplicateKeyError,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)
from pymongo.errors import ConfigurationError as BadOption
from pymongo.read_concern import ReadConcern

from text2img.databases.documents import WEBHOOK_PENDING
from text2img.errors import ConfigurationError, DatabaseFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from pymongo.collection import Collection
    from pymongo.database import Database as MongoDatabaseHandle

    from text2img.databases import Collections


Document = dict[str, Any]

PATIENCE: Final = 10
"""Seconds until a server that does not answer counts as absent."""
SILENCE: Final = 60
"""Seconds a single command may take; a stalled server must not hold a run for ever."""
_AUTHENTICATION_FAILED: Final = 18
_UNAUTHORIZED: Final = 13


class Addressed(Protocol):
    """Whoever knows for error messages which server and database it speaks with."""

    address: str
    name: str


_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S", bound=Addressed)


def translate_errors(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """The method with the errors of pymongo and of its encoding as DatabaseFailed.

    It is tried once more when the connection broke in its midst, as it does while a replica set elects a
    new primary: every method of the contract may be repeated.
    """

    @functools.wraps(method)
    def reporting(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            try:
                return method(self, *args, **kwargs)
            except ServerSelectionTimeoutError:
                raise
            except AutoReconnect:
                return method(self, *args, **kwargs)
        except (PyMongoError, BSONError, OverflowError, UnicodeEncodeError) as exc:
            raise DatabaseFailed(error_message(exc, self.address, self.name)) from exc

    return reporting


def error_message(exc: Exception, address: str, name: str) -> str:
    """What went wrong, in one line that never shows the URI."""
    code = exc.code if isinstance(exc, OperationFailure) else None
    if code == _AUTHENTICATION_FAILED or "Authentication failed" in str(exc):
        return f"MongoDB at {address} refuses the user or the password; check both and authSource in the URI"
    if code == _UNAUTHORIZED:
        return f"MongoDB at {address} lets this user not work on database {name}; grant it readWrite there"
    if isinstance(exc, ServerSelectionTimeoutError):
        hint = "; its TLS certificate was not accepted" if "CERTIFICATE" in str(exc).upper() else ""
        return (
            f"no MongoDB answers at {address} within {PATIENCE} seconds{hint}; "
            "check the address and that the server can be reached from here"
        )
    if isinstance(exc, AutoReconnect):
        return f"the connection to MongoDB at {address} broke; run it again once the server is back"
    return f"MongoDB at {address}, database {name}: {_first_line(exc)}"


def connect(uri: str) -> MongoClient[Document]:
    """A client for the URI, which need not have reached its server yet; raises ConfigurationError."""
    try:
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always")
            client = _client(uri)
    except (InvalidURI, ValueError, TypeError):
        # The reason may quote a piece of the password, where a character in it should have been escaped.
        raise ConfigurationError(
            "the MongoDB URI cannot be read; write mongodb://user:password@host:27017/database, "
            "and %-escape every : / ? # [ ] @ % in the user and the password"
        ) from None
    except BadOption as exc:
        raise ConfigurationError(f"the MongoDB URI cannot be used: {_first_line(exc)}; check it") from None
    invalid_value = [str(remark.message) for remark in remarks if "Unknown option" not in str(remark.message)]
    if invalid_value:
        # pymongo would drop the option and go on, at worst without TLS. Options it does not know are
        # those of other drivers, and may stay.
        client.close()
        raise ConfigurationError(
            f"the MongoDB URI has an option that cannot be used: {invalid_value[0]}; check it"
        )
    return client


def _client(uri: str) -> MongoClient[Document]:
    return MongoClient(
        uri,
        appname="text2img",
        tz_aware=True,
        datetime_conversion="DATETIME_AUTO",
        unicode_decode_error_handler="replace",
        uuidRepresentation="standard",
        serverSelectionTimeoutMS=PATIENCE * 1000,
        connectTimeoutMS=PATIENCE * 1000,
        socketTimeoutMS=SILENCE * 1000,
    )


def database_of(client: MongoClient[Document]) -> MongoDatabaseHandle[Document]:
    """The database that the URI's path names, else ``text2img``.

    Whatever the URI says of reading from secondaries or of unacknowledged writes would break the claim.
    """
    return client.get_default_database("text2img").with_options(
        read_preference=ReadPreference.PRIMARY,
        read_concern=ReadConcern("local"),
        write_concern=WriteConcern("majority"),
    )


def address_of(uri: str) -> str:
    """The hosts of a URI, for messages: nothing of user, password or options."""
    _, _, rest = uri.partition("://")
    authority = rest.partition("?")[0].rpartition("@")[2] if "@" in rest else rest
    return authority.partition("/")[0].partition("?")[0] or "an unnamed host"


def _first_line(exc: Exception) -> str:
    details = exc.details if isinstance(exc, OperationFailure) else None
    said = str((details or {}).get("errmsg") or exc).strip()
    return said.splitlines()[0].partition(", full error:")[0][:300]


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
        ((WEBHOOK_PENDING, ASCENDING),),
        {"partialFilterExpression": {WEBHOOK_PENDING: {"$exists": True}}},
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

    @translate_errors
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
