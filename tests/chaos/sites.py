"""Where a job's prompts and pictures are: behind gates over the wire, or in files. Looked at past the job."""

from __future__ import annotations

import sqlite3
import uuid
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import requests
from pymongo import MongoClient

from tests.chaos.gates import Gate, http_message, wire_message
from tests.chaos.listener import Listener
from text2img.databases import Collections, open_database

_LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)


class Site:
    """What both kinds share. ``arguments`` and ``variables`` are what a worker here is started with.

    ``end_leases`` lets time pass for the leases in some tables, where sitting it out would show nothing more.
    """

    def __init__(self, folder, listener):
        self.folder, self.listener = folder, listener
        self.arguments = ["--callback-url", listener.url] if listener else []
        self.variables = {}

    def go(self):
        """Let every worker go on that stands still where it was started to; none will from now on."""
        (self.folder / "go").touch()

    def release(self):
        """Let the devices finish the prompts whose text says ``hold``."""
        (self.folder / "release").touch()

    def can_be_written(self):
        """Whether no worker is in the midst of a write that keeps all others from theirs."""
        return True

    def leases_over(self):
        """Whether neither a prompt nor a run is held by anybody."""
        return not any(map(_is_held, [*self.documents("datasets"), *self.documents("runs")]))

    def on_device(self):
        """The prompts that are on a worker's device, or were when it died less than a lease ago."""
        return {
            each["_id"]
            for each in self.documents("datasets")
            if _is_held(each) and each.get("started_claim") == each["claim_number"]
        }


class FileSite(Site):
    """A SQLite file and a folder of pictures."""

    def __init__(self, folder, listener=None):
        super().__init__(folder, listener)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / "prompts.db"
        url = f"sqlite:///{self.file}"
        self.arguments += ["--database", url, "--output", str(folder / "pictures")]
        open_database(url, Collections()).close()  # makes the tables

    def add(self, prompts):
        names = list(prompts[0])
        insert = f"INSERT INTO datasets ({', '.join(names)}) VALUES ({', '.join(['?'] * len(names))})"  # noqa: S608
        with closing(sqlite3.connect(self.file)) as database, database:
            database.executemany(insert, [[each[name] for name in names] for each in prompts])

    def documents(self, table):
        with closing(sqlite3.connect(self.file, timeout=15)) as database:
            database.row_factory = sqlite3.Row
            found = [dict(row) for row in database.execute(f"SELECT * FROM {table}")]  # noqa: S608
        return [{name: value for name, value in each.items() if value is not None} for each in found]

    def count(self, status):
        with closing(sqlite3.connect(self.file, timeout=15)) as database:
            return database.execute("SELECT count(*) FROM datasets WHERE status = ?", [status]).fetchone()[0]

    def can_be_written(self):
        with closing(sqlite3.connect(self.file, timeout=0)) as database:
            try:
                database.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
        return True

    def end_leases(self, *tables):
        with closing(sqlite3.connect(self.file, timeout=15)) as database, database:
            for table in tables:
                database.execute(
                    f"UPDATE {table} SET lease_expires_at = ? WHERE lease_expires_at IS NOT NULL",  # noqa: S608
                    [_LONG_AGO.isoformat()],
                )

    def image(self, name):
        return (self.folder / "pictures" / f"{name}.png").read_bytes()


class WireSite(Site):
    """A MongoDB server and a bucket, each behind a gate."""

    def __init__(self, folder, listener, wire):
        super().__init__(folder, listener)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"chaos_{uuid.uuid4().hex[:10]}"
        self.mongodb, self.bucket, self._database = wire.mongodb, wire.bucket, wire.client[name]
        self._pictures = f"{wire.gcs.host}/{wire.gcs.bucket}/{name}"
        self.arguments += [
            *("--mongo-uri", f"mongodb://127.0.0.1:{wire.mongodb.port}/{name}?directConnection=true"),
            *("--output", f"gs://{wire.gcs.bucket}/{name}"),
        ]
        self.variables = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{wire.bucket.port}"}

    def add(self, prompts):
        self._database.datasets.insert_many([{"status": "pending", **each} for each in prompts])

    def documents(self, table):
        return list(self._database[table].find())

    def count(self, status):
        return self._database.datasets.count_documents({"status": status})

    def end_leases(self, *tables):
        for table in tables:
            self._database[table].update_many(
                {"lease_expires_at": {"$exists": True}}, {"$set": {"lease_expires_at": _LONG_AGO}}
            )

    def image(self, name):
        answer = requests.get(f"{self._pictures}/{name}.png", timeout=10)
        answer.raise_for_status()
        return answer.content


@dataclass(frozen=True)
class Wire:
    """The servers, past their gates, and the gates."""

    client: MongoClient
    gcs: object
    mongodb: Gate
    bucket: Gate


@contextmanager
def wired(mongodb_uri, gcs):
    """Gates before the two servers, for as long as the block lasts."""
    ports = [int(each.rpartition(":")[2]) for each in (mongodb_uri, gcs.host)]
    with (
        MongoClient(mongodb_uri, tz_aware=True) as client,
        Gate(ports[0], wire_message) as mongodb,
        Gate(ports[1], http_message) as bucket,
    ):
        yield Wire(client, gcs, mongodb, bucket)


@contextmanager
def wire_site(folder, wire):
    """A new, empty site over the wire, with a listener of its own."""
    with Listener() as listener:
        yield WireSite(folder, listener, wire)


@contextmanager
def file_site(folder):
    """A new, empty site in files, with a listener of its own."""
    with Listener() as listener:
        yield FileSite(folder, listener)


def _is_held(document):
    until = document.get("lease_expires_at", _LONG_AGO)
    return (datetime.fromisoformat(until) if isinstance(until, str) else until) > datetime.now(UTC)
