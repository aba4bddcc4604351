"""Secrets stay where they were put: out of every line, document and callback, also at DEBUG."""

from __future__ import annotations

from bson import json_util
from pymongo import MongoClient

from tests.acceptance import product
from tests.acceptance.product import sleeping
from tests.servers import free_port

KEY = "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
PLANTED = {
    "CALLBACK_SECRET": f"whsec_{KEY}",
    "INTERNAL_API_TOKEN": "hush-token-4711",
}
WORDS = (KEY, "hush-token-4711", "hush-path-4711", "hush-query", "hush-word")
LOUDLY = ("--log-level", "DEBUG", "--log-file", "run.log", "--callback-patience", "0")


def _said(folder, *commands, **variables):
    """All that these commands say on either stream and in the log file."""
    said = []
    for arguments in commands:
        finished = sleeping.run(*arguments, folder=folder, **PLANTED, **variables)
        said += [finished.stdout, finished.stderr]
    said += [path.read_text() for path in folder.glob("*.log")]
    return "".join(said)


def test_no_secret_is_said_or_kept(tmp_path, mongodb_server, httpserver):
    """Runs, dry runs, status and doctor at DEBUG, told and refused, leave no planted secret anywhere."""
    uri = f"{mongodb_server}/secrets"
    model = ("--output", "pictures", "--model-id", str(product.MODEL))
    httpserver.expect_request("/hush-path-4711").respond_with_data("")
    alive = httpserver.url_for("/hush-path-4711?key=hush-query|1&ü=2")
    dead = f"http://night:hush-word@127.0.0.1:{free_port()}/hush-path-4711?key=hush-query|1&ü=2"
    with MongoClient(uri) as client:
        database = client.get_default_database()
        said = ""
        for number, url in enumerate((dead, alive)):
            database.datasets.insert_many(
                [{"_id": f"{number} good", "text": "a boat"}, {"_id": number, "text": ""}]
            )
            job = ("--mongo-uri", uri, *model, "--callback-url", url, *LOUDLY)
            run = ("run", *job)
            said += _said(tmp_path, ("run", "--dry-run", *job), ("doctor", *job), run)
        said += _said(tmp_path, ("status", "--mongo-uri", uri))
        kept = "".join(json_util.dumps(document) for name in database.list_collection_names()
                       for document in database[name].find())  # fmt: skip
    told = "".join(request.get_data(as_text=True) for request, _ in httpserver.log)
    assert "completed" in said
    assert "0 good" in told
    assert '"run_id"' in kept
    for place, text in (("output", said), ("documents", kept), ("callbacks", told)):
        for word in WORDS:
            assert word not in text, f"{word} is in the {place}"


def test_no_password_is_said_when_nobody_answers(tmp_path):
    """A MongoDB that cannot be reached, at DEBUG: its password is in no line and in no stack trace."""
    password = "hush%2Fw%C3%B6rd%40"
    uri = f"mongodb://night:{password}@127.0.0.1:{free_port()}/x?serverSelectionTimeoutMS=300"
    said = _said(tmp_path, ("run", "--mongo-uri", uri, "--output", "p", *LOUDLY))
    assert "127.0.0.1" in said
    for word in ("hush", password):
        assert word not in said
