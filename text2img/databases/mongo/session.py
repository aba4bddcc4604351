"""A MongoDB connection: the client, the collections with their indexes, and one-line error messages."""

from __future__ import annotations

import functools
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Protocol, TypeVar
from urllib.parse import parse_qsl

import pymongo
from bson.errors import BSONError
from pymongo import ASCENDING, DESCENDING, MongoClient, ReadPreference, WriteConcern
from pymongo.errors import (
    AutoReconnect,
    BulkWriteError,
    DocumentTooLarge,
    DuplicateKeyError,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)
from pymongo.errors import ConfigurationError as BadOption
from pymongo.read_concern import ReadConcern

from text2img.databases.documents import WEBHOOK_PENDING
from text2img.errors import ConfigurationError, DatabaseFailed, WritesRejected
from text2img.settings import tls_fault

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pymongo import UpdateOne
    from pymongo.collection import Collection
    from pymongo.database import Database as MongoDatabaseHandle

    from text2img.databases import Collections


Document = dict[str, Any]

CONNECT_TIMEOUT: Final = 10
"""Seconds until a server that does not respond counts as unreachable."""
SOCKET_TIMEOUT: Final = 60
"""Seconds that a single command may take; a stalled server must not block a run indefinitely."""
_AUTHENTICATION_FAILED: Final = 18
_UNAUTHORIZED: Final = 13
_DOCUMENT_TOO_LARGE: Final = 10334
DUPLICATE_KEY: Final = 11000


class HasSession(Protocol):
    """A part of the database that works on a session."""

    session: Session


_P = ParamSpec("_P")
_R = TypeVar("_R")
_S = TypeVar("_S", bound=HasSession)


def translate_errors(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
    """Wrap the method so that errors of pymongo and of encoding are raised as DatabaseFailed.

    If the connection breaks during the call, as it does while a replica set elects a new primary, the call
    is repeated once: every method of the Protocols may be repeated.
    """

    @functools.wraps(method)
    def translating(self: _S, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return _translate_errors(self.session, functools.partial(method, self, *args, **kwargs))

    return translating


def _translate_errors(session: Session, action: Callable[[], _R]) -> _R:
    try:
        try:
            return action()
        except ServerSelectionTimeoutError:
            raise
        except AutoReconnect:
            return action()
    except (PyMongoError, BSONError, OverflowError, UnicodeEncodeError) as exc:
        raise DatabaseFailed(error_message(exc, session.address, session.name)) from exc


_REJECTIONS: Final = frozenset({121, 2, 9, 14, 28, 40, 52, 55, 56, 57, 66, 10334, 17280, 17419, 17420})
"""Codes with which the server rejects a write because of what its one document holds: the collection's
validator, a field that cannot be updated, or more than 16 MB."""


def rejection(exc: Exception) -> str | None:
    """Return why a document was rejected, in one line; None if the error is not about one document."""
    code = exc.code if isinstance(exc, OperationFailure) else None
    if code in _REJECTIONS or isinstance(
        exc, DocumentTooLarge | BSONError | OverflowError | UnicodeEncodeError
    ):
        return _reason(_first_line(exc), exc.details if isinstance(exc, OperationFailure) else None)
    return None


def write_each(
    collection: Collection[Document], updates: Sequence[UpdateOne]
) -> tuple[int, dict[int, Mapping[str, Any]]]:
    """Write the updates, each by itself; return how many matched, and the errors by the update's index.

    An error has ``code`` and ``errmsg``. Raises what is not an error of single updates.
    """
    if not updates:
        return 0, {}
    try:
        result = collection.bulk_write(list(updates), ordered=False)
    except BulkWriteError as exc:
        if exc.details["writeConcernErrors"]:
            raise
        return exc.details["nMatched"], {error["index"]: error for error in exc.details["writeErrors"]}
    except (DocumentTooLarge, BSONError, OverflowError, UnicodeEncodeError) as exc:
        # Found before anything was sent: one update spoils all that are sent with it.
        if len(updates) == 1:
            return 0, {0: {"code": _DOCUMENT_TOO_LARGE, "errmsg": _first_line(exc)}}
        alone = [write_each(collection, [update]) for update in updates]
        errors = {index: failed[0] for index, (_, failed) in enumerate(alone) if failed}
        return sum(count for count, _ in alone), errors
    return result.matched_count, {}


def reason_of(error: Mapping[str, Any], collection: str) -> str:
    """Return why a write was rejected, in one line; raise DatabaseFailed if it is not for its document."""
    message = str(error.get("errmsg") or "").partition("\n")[0][:300]
    if error["code"] == DUPLICATE_KEY:
        raise WritesRejected(_index_message(index_of(error), collection))
    if error["code"] not in _REJECTIONS:
        raise DatabaseFailed(f"{collection}: {message}")
    return _reason(message, error.get("errInfo"))


NO_INDEX: Final = "of another program"
"""In place of a unique index's name that the server's error does not give."""


def index_of(error: Mapping[str, Any]) -> str:
    """Return the name of the unique index that a write violates."""
    found = re.search(r"index: (\S+)", str(error.get("errmsg")))
    return found[1] if found else NO_INDEX


def _index_message(index: str, collection: str) -> str:
    return (
        f"the unique index {index} of {collection} rejects what this job writes; "
        "drop it or make it partial, or name another collection"
    )


def _reason(message: str, info: object) -> str:
    """Return the server's message; for the collection's own schema, with the fields that it names."""
    if "validation" not in message.lower():
        return message
    fields = sorted(set(_named_fields(info)))
    return "the collection's schema rejects it" + (f" ({', '.join(fields)[:200]})" if fields else "")


def _named_fields(info: object) -> Iterator[str]:
    """Yield the names of the fields that a server's account of a failed validation contains."""
    if isinstance(info, list):
        for each in info:
            yield from _named_fields(each)
    elif isinstance(info, dict):
        for key, value in info.items():
            if key in {"missingProperties", "additionalProperties"} and isinstance(value, list):
                yield from (str(name) for name in value)
            elif key == "propertyName":
                yield str(value)
            else:
                yield from _named_fields(value)


def error_message(exc: Exception, address: str, name: str) -> str:
    """Return the error in one line that never shows the URI."""
    code = exc.code if isinstance(exc, OperationFailure) else None
    if code == _AUTHENTICATION_FAILED or "Authentication failed" in str(exc):
        return f"MongoDB at {address} rejected the user or the password; check both and authSource in the URI"
    if code == _UNAUTHORIZED:
        return f"MongoDB at {address} denies this user access to database {name}; grant it readWrite there"
    if code == DUPLICATE_KEY:
        return _index_message(index_of({"errmsg": str(exc)}), f"database {name}")
    if isinstance(exc, ServerSelectionTimeoutError):
        hint = "; the TLS handshake failed: does the server use TLS?" if "SSL handshake" in str(exc) else ""
        return (
            f"MongoDB at {address} did not respond within {CONNECT_TIMEOUT} seconds{hint}; "
            "check the address and that the server is reachable from here"
        )
    if isinstance(exc, AutoReconnect):
        return f"lost the connection to MongoDB at {address}; run it again once the server is back"
    return f"MongoDB at {address}, database {name}: {_first_line(exc)}"


def connect(uri: str) -> MongoClient[Document]:
    """Return a client for the URI, not necessarily connected yet; raise ConfigurationError if invalid."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            client = _client(uri)
    except (InvalidURI, ValueError, TypeError):
        # The exception may quote a part of the password, if a character in it was not escaped.
        raise ConfigurationError(
            "invalid MongoDB URI; write mongodb://user:password@host:27017/database, "
            "and %-escape every : / ? # [ ] @ % in the user and the password"
        ) from None
    except BadOption as exc:
        raise ConfigurationError(f"invalid MongoDB URI: {_first_line(exc)}; correct it") from None
    except OSError as exc:  # pymongo reads the TLS files; an SSLError is an OSError
        raise ConfigurationError(_describe_tls_files(uri, exc)) from None
    messages = [str(warning.message) for warning in caught]
    invalid_options = [message for message in messages if "Unknown option" not in message]
    if invalid_options:
        # pymongo would ignore the option and continue, at worst without TLS. Options it does not know
        # belong to other drivers and are accepted.
        client.close()
        raise ConfigurationError(f"invalid option in the MongoDB URI: {invalid_options[0]}; correct it")
    return client


_TLS_FILES: Final = {
    "tlscafile": "tlsCAFile",
    "tlscertificatekeyfile": "tlsCertificateKeyFile",
    "tlscrlfile": "tlsCRLFile",
}
"""Options of a URI that name a file, by their names in lower case: the case has no meaning."""


def _describe_tls_files(uri: str, error: OSError) -> str:
    """Return an error message that names the option whose file cannot be read; else all that are given."""
    given = {
        _TLS_FILES[name.lower()]: value
        for name, value in parse_qsl(uri.partition("?")[2], keep_blank_values=True)
        if name.lower() in _TLS_FILES
    }
    for name, value in given.items():
        try:
            with Path(value).open("rb"):
                pass
        except OSError as exc:
            return f"{name} in the MongoDB URI names {value[:200]!r}, which cannot be read: {exc.strerror}"
    files = ", ".join(f"{name} {value[:200]!r}" for name, value in given.items()) or "the certificates"
    return f"TLS for MongoDB cannot be set up with {files}: {_first_line(error)}; use files in PEM format"


def _client(uri: str) -> MongoClient[Document]:
    return MongoClient(
        uri,
        appname="text2img",
        tz_aware=True,
        datetime_conversion="DATETIME_AUTO",
        unicode_decode_error_handler="replace",
        uuidRepresentation="standard",
        serverSelectionTimeoutMS=CONNECT_TIMEOUT * 1000,
        connectTimeoutMS=CONNECT_TIMEOUT * 1000,
        socketTimeoutMS=SOCKET_TIMEOUT * 1000,
    )


def database_of(client: MongoClient[Document]) -> MongoDatabaseHandle[Document]:
    """Return the database that the URI's path names, else ``text2img``.

    Overrides the URI's read preference and write concern: reads from secondaries and unacknowledged writes
    would break claims.
    """
    return client.get_default_database("text2img").with_options(
        read_preference=ReadPreference.PRIMARY,
        read_concern=ReadConcern("local"),
        write_concern=WriteConcern("majority"),
    )


def address_of(uri: str) -> str:
    """Return the hosts of a URI, for messages: without user, password and options."""
    _, _, rest = uri.partition("://")
    authority = rest.partition("?")[0].rpartition("@")[2] if "@" in rest else rest
    return authority.partition("/")[0].partition("?")[0] or "an unnamed host"


def _first_line(exc: Exception) -> str:
    details = exc.details if isinstance(exc, OperationFailure) else None
    message = str((details or {}).get("errmsg") or exc).strip()
    return message.splitlines()[0].partition(", full error:")[0][:300]


@dataclass(frozen=True, slots=True)
class Index:
    """An index on ``keys``; ``collection`` is the name of a field of Collections."""

    collection: str
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
        {"unique": True, "sparse": True},  # sparse: permits other programs' documents without a dataset_id
    ),
    Index("callbacks", "text2img_due", (("state", ASCENDING), ("created_at", ASCENDING))),
    Index("runs", "text2img_latest", (("started_at", DESCENDING),)),
)


def create_index(index: Index, collection: Collection[dict[str, Any]], collections: Collections) -> None:
    """Create the index unless an equivalent one exists, in which case the right to create is not needed.

    Raises DatabaseFailed if a prompt has several results; other errors are pymongo's.
    """
    if _exists(index, collection):
        return
    try:
        collection.create_index(list(index.keys), name=index.name, **index.options)
    except DuplicateKeyError as exc:
        raise DatabaseFailed(
            f"{collections.dataset_records} holds several results with the same dataset_id, but each prompt "
            "may have only one; remove the surplus ones, or name another collection"
        ) from exc


def _exists(index: Index, collection: Collection[dict[str, Any]]) -> bool:
    """Return True if an index on the same keys, at least as unique, exists under any name.

    A unique index that is not sparse is stricter than a sparse one, and so is accepted.
    """
    return any(
        tuple(existing["key"]) == index.keys
        and bool(existing.get("unique")) >= bool(index.options.get("unique"))
        and bool(existing.get("sparse")) <= bool(index.options.get("sparse"))
        and existing.get("partialFilterExpression") == index.options.get("partialFilterExpression")
        for existing in collection.index_information().values()
    )


_CLOSE_TIMEOUT: Final = 1
"""Seconds for ending the sessions at the server, which otherwise expire there by themselves."""


class Session:
    """The collections of one database, given by a MongoDB URI whose path names it.

    Raises ConfigurationError for an invalid URI. Threads may share it, as they may share pymongo's client.
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

    def open(self, *, create: bool = True) -> None:
        """Connect and, with ``create``, create the indexes. May be repeated.

        Raises DatabaseFailed, and ConfigurationError for a certificate that is not trusted.
        """
        try:
            _translate_errors(self, functools.partial(self._open, create))
        except DatabaseFailed as exc:
            fault = tls_fault(exc.__cause__, "tlsCAFile=FILE in the URI")
            if fault and "certificate" in fault:
                raise ConfigurationError(f"MongoDB at {self.address}: {fault}") from exc
            raise

    def _open(self, create: bool) -> None:  # noqa: FBT001 - open's keyword
        # A query, not a ping: a server also answers the ping of a user without any rights.
        self.datasets.find_one({}, {"_id": 1})
        for index in INDEXES if create else ():
            create_index(index, self._collection(getattr(self._names, index.collection)), self._names)

    def close(self) -> None:
        """Close the connections. May be repeated."""
        with pymongo.timeout(_CLOSE_TIMEOUT):
            self._client.close()

    def _collection(self, name: str) -> Collection[Document]:
        return self._database[name]


def exists(collection: Collection[Document]) -> bool:
    """Return True if the collection exists, or if this account may not list collections."""
    try:
        return collection.name in collection.database.list_collection_names(filter={"name": collection.name})
    except OperationFailure:
        return True
