"""What the database suite is run against, and how a test looks past the adapter at what stands there."""

from __future__ import annotations

import json
import sqlite3
import uuid
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import urlsplit

from pymongo import MongoClient

from text2img.databases import Collections, Selection, open_database
from text2img.errors import ErrorCode
from text2img.prompts import Failed, RetryLater

ALL = Selection()
MINUTE = 60.0
STRUCTURES = {"tries", "used", "image_urls", "sha256s", "loras", "lora", "prompt_tags"}
"""What SQLite keeps as JSON."""


class SqliteBackend:
    """A fresh SQLite file."""

    kind = "sqlite"

    def __init__(self, folder):
        self.file = folder / "prompts.db"
        self.url = f"sqlite:///{self.file}"

    def put(self, document, table="datasets"):
        self.put_all([document], table)

    def put_all(self, documents, table="datasets"):
        with closing(sqlite3.connect(self.file)) as connection, connection:
            known = {row[1] for row in connection.execute(f"PRAGMA table_info({table})")}
            for document in documents:
                for name in document.keys() - known:
                    connection.execute(f'ALTER TABLE {table} ADD COLUMN "{name}"')
                    known.add(name)
                names, places = ", ".join(f'"{name}"' for name in document), ", ".join("?" * len(document))
                values = [json.dumps(v) if isinstance(v, dict | list) else v for v in document.values()]
                statement = f"INSERT INTO {table} ({names}) VALUES ({places})"  # noqa: S608 - own names
                connection.execute(statement, values)

    def change(self, document_id, fields, table="datasets"):
        assignments = ", ".join(f'"{name}" = ?' for name in fields)
        with closing(sqlite3.connect(self.file)) as connection, connection:
            statement = f"UPDATE {table} SET {assignments} WHERE _id IS ?"  # noqa: S608 - the tests' own
            connection.execute(statement, [*fields.values(), document_id])

    def get(self, document_id, table="datasets", key="_id"):
        with closing(sqlite3.connect(self.file)) as connection:
            connection.row_factory = sqlite3.Row
            statement = f"SELECT * FROM {table} WHERE {key} IS ?"  # noqa: S608 - the tests' own names
            row = connection.execute(statement, [document_id]).fetchone()
        found = {name: value for name, value in dict(row).items() if value is not None} if row else None
        return found and {**found, **{name: _read(found[name]) for name in STRUCTURES & found.keys()}}

    def count(self, table):
        with closing(sqlite3.connect(self.file)) as connection:
            statement = f"SELECT count(*) FROM {table}"  # noqa: S608 - the tests' own names
            return connection.execute(statement).fetchone()[0]

    def has(self, table):
        with closing(sqlite3.connect(self.file)) as connection:
            found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", [table])
            return found.fetchone() is not None

    def remove(self):
        pass


def _read(value):
    """A list or an object from its JSON; a notice's ``tries`` are a number."""
    return json.loads(value) if isinstance(value, str) else value


class MongoBackend:
    """A fresh database on a MongoDB server."""

    def __init__(self, kind, uri):
        self.kind = kind
        parts = urlsplit(uri)
        self.name = f"t{uuid.uuid4().hex[:16]}"
        self.url = parts._replace(path=f"/{self.name}").geturl()
        self.client = MongoClient(self.url, uuidRepresentation="standard", tz_aware=True)
        self.database = self.client[self.name]

    def put(self, document, table="datasets"):
        self.put_all([document], table)

    def put_all(self, documents, table="datasets"):
        if documents:
            self.database[table].insert_many([dict(document) for document in documents])

    def change(self, document_id, fields, table="datasets"):
        update = {"$set": {name: value for name, value in fields.items() if value is not None}}
        gone = {name: "" for name, value in fields.items() if value is None}
        update = {verb: what for verb, what in {**update, "$unset": gone}.items() if what}
        self.database[table].update_one({"_id": document_id}, update)

    def get(self, document_id, table="datasets", key="_id"):
        return self.database[table].find_one({key: document_id})

    def count(self, table):
        return self.database[table].count_documents({})

    def has(self, table):
        return table in self.database.list_collection_names()

    def remove(self):
        if self.kind == "mongodb":
            self.client.drop_database(self.name)
        self.client.close()


@dataclass
class Stand:
    """A backend, opened: ``database`` is what is tried, ``backend`` looks past it."""

    backend: SqliteBackend | MongoBackend
    database: object

    def put(self, *documents, table="datasets"):
        if table == "datasets":
            documents = [{"text": "a boat", **document} for document in documents]
        self.backend.put_all(documents, table)

    def get(self, document_id):
        return self.backend.get(document_id)

    def result(self, document_id):
        return self.backend.get(document_id, "dataset_records", "dataset_id")

    def claim(self, worker="w", limit=10, lease=MINUTE, selection=ALL):
        return self.database.queue.claim(worker, limit, lease, selection)

    def claim_one(self, worker="w", lease=MINUTE):
        (prompt,) = self.claim(worker, 1, lease)
        return prompt

    def record(self, *outcomes, run_id="run-1", notify=False):
        return self.database.queue.record(outcomes, run_id, notify=notify)


def opened(url, collections=None):
    return open_database(url, collections or Collections())


def failed(prompt, code=ErrorCode.SAFETY):
    return Failed(prompt=prompt, code=code, message="$it was flagged", attempts=1)


def postponed(prompt, wait=0.0):
    code = ErrorCode.GENERATION_FAILED
    return RetryLater(prompt=prompt, code=code, message="it broke", attempts=1, wait=wait)


def texts(prompts):
    return [prompt.id.text for prompt in prompts]
