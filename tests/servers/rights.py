"""Accounts with rights: Cloud Storage behind a gate that asks what an account may, MongoDB with a role."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from contextlib import contextmanager
from urllib.parse import parse_qs, urlsplit

from pymongo import MongoClient

from tests.servers import free_port, running
from tests.servers.mongodb import answers, mongodb_in
from tests.servers.tap import Handler, tapped

_BUCKET = re.compile(r"/b/([^/?]+)(/o)?(/[^?]+)?")


class _Gatekeeper(Handler):
    """Refuses what the account has no right to, as Cloud Storage words it."""

    def _forwarded(self):
        url = urlsplit(self.path)
        bucket, objects, name = _BUCKET.search(url.path).groups()
        needed = _rights(self.command, parse_qs(url.query), objects, name)
        missing = needed - self.tap.rights[bucket]
        if missing:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            message = f"the account does not have {min(missing)} access to {bucket}"
            body = json.dumps({"error": {"code": 403, "message": message}}).encode()
            return 403, [("Content-Type", "application/json")], body
        self.tap.used[bucket] |= needed
        return super()._forwarded()


def _rights(method, query, objects, name):
    """What Cloud Storage asks of an account for the request."""
    if not objects:
        return {"storage.buckets.get"}
    if method == "POST":
        replaces = query.get("ifGenerationMatch") != ["0"]
        return {"storage.objects.create"} | ({"storage.objects.delete"} if replaces else set())
    if method == "DELETE":
        return {"storage.objects.delete"}
    return {"storage.objects.get" if name else "storage.objects.list"}


@contextmanager
def gcs_with_rights(server, rights):
    """A Tap before the server that grants so much on each bucket; ``used`` is what was asked for of it."""
    with tapped(server.host, _Gatekeeper) as tap:
        tap.rights, tap.used = defaultdict(set, rights), defaultdict(set)
        yield tap


@contextmanager
def mongodb_with_role(folder, database, role):
    """The URIs of a server for its owner and for an account that has that role, a createRole command, alone.

    The server keeps a role's actions for all collections of a database alike.
    """
    with mongodb_in(folder) as uri, MongoClient(uri) as client:
        client[database].command(role)
        client[database].command({"createUser": "job", "pwd": "hush", "roles": [role["createRole"]]})
        client.admin.command({"createUser": "owner", "pwd": "hush", "roles": ["root"]})
    port = free_port()
    arguments = ["--port", str(port), "--storage-path", str(folder / "data"), "--auth"]
    owner = f"mongodb://owner:hush@127.0.0.1:{port}/{database}?authSource=admin"
    with (
        MongoClient(owner, serverSelectionTimeoutMS=200) as client,
        running("secantusd-py", arguments, folder, lambda: answers(client)),
    ):
        yield owner, f"mongodb://job:hush@127.0.0.1:{port}/{database}?authSource={database}"
