"""The connection to MongoDB: how it is opened, what it shows of itself, and its errors in one line each."""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Protocol, TypeVar

from bson.errors import BSONError
from pymongo import MongoClient, ReadPreference, WriteConcern
from pymongo.errors import (
    AutoReconnect,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)
from pymongo.errors import ConfigurationError as BadOption
from pymongo.read_concern import ReadConcern

from text2img.errors import ConfigurationError, DatabaseFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from pymongo.database import Database as MongoDatabaseHandle

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


def reported(method: Callable[Concatenate[_S, _P], _R]) -> Callable[Concatenate[_S, _P], _R]:
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
            raise DatabaseFailed(sentence(exc, self.address, self.name)) from exc

    return reporting


def sentence(exc: Exception, address: str, name: str) -> str:
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
    wrong = [str(remark.message) for remark in remarks if "Unknown option" not in str(remark.message)]
    if wrong:
        # pymongo would drop the option and go on, at worst without TLS. Options it does not know are
        # those of other drivers, and may stay.
        client.close()
        raise ConfigurationError(f"the MongoDB URI has an option that cannot be used: {wrong[0]}; check it")
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
