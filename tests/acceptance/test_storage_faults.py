"""A storage that refuses or falters: what the whole job makes of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sqlite3
from contextlib import closing

import pytest
from werkzeug import Response

from tests.acceptance import product
from tests.acceptance.product import sleeping

DATABASE = ("--database", "sqlite:///prompts.db")
JOB = (*DATABASE, "--gcs-bucket", "stub", "--model-id", str(product.MODEL))
UPLOAD = re.compile("/upload/storage/v1/b/stub/o")


@pytest.fixture
def job(tmp_path, httpserver):
    """Three pending prompts and a bucket that is there; returns a function that runs the job."""
    product.add(tmp_path, *({"id": n, "text": product.SCENE} for n in range(3)))
    httpserver.expect_request("/storage/v1/b/stub").respond_with_json({"name": "stub"})
    host = httpserver.url_for("").rstrip("/")
    return lambda: sleeping.run(*JOB, folder=tmp_path, STORAGE_EMULATOR_HOST=host)


def _stored(request):
    name = re.search(rb'"name": "([^"]+)"', request.get_data())[1].decode()
    return Response(json.dumps({"name": name, "generation": "1"}), content_type="application/json")


def test_a_bucket_that_refuses_every_write_fails_the_run(job, tmp_path, httpserver):
    """403 to every write: one clear line, status 1, all prompts pending at once, none marked as failed."""
    httpserver.expect_request(UPLOAD, method="POST").respond_with_data("", status=403)
    finished = job()
    assert finished.returncode == 1, finished.stderr
    assert "storage.objects.create" in json.loads(product.errors(finished)[-1])["message"]
    assert product.counts(tmp_path) == {"pending": 3}


def test_one_object_that_is_refused_is_that_prompts_error(job, tmp_path, httpserver):
    """400 to one object: that prompt ends in ``storage_rejected``, the others complete, status 3."""

    def picky(request):
        return Response("", status=400) if b'"generated/1.png"' in request.get_data() else _stored(request)

    httpserver.expect_request(UPLOAD, method="POST").respond_with_handler(picky)
    finished = job()
    assert finished.returncode == 3, finished.stderr
    assert product.counts(tmp_path) == {"completed": 2, "error": 1}
    assert "storage_rejected 1" in product.run("status", *DATABASE, folder=tmp_path).stdout


def test_a_bucket_that_is_busy_is_asked_again(job, tmp_path, httpserver):
    """429 and 503 are tried again until they pass; the run knows nothing but success. How long it waits
    between its tries, a unit test shows.
    """
    codes = [429, 503, 429, 503]

    def busy(request):
        if b'"generated/1.png"' in request.get_data() and codes:
            return Response("", status=codes.pop())
        return _stored(request)

    httpserver.expect_request(UPLOAD, method="POST").respond_with_handler(busy)
    finished = job()
    assert finished.returncode == 0, finished.stderr
    assert (product.counts(tmp_path), codes) == ({"completed": 3}, [])


def test_an_object_that_was_recorded_is_replaced_by_who_holds_the_claim(job, tmp_path, httpserver):
    """412 to a first upload: what is there is read, and the picture that was recorded gives way at the
    generation that was read; 412 to that as well, and by then the same picture is there: it is left alone.
    """
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute("UPDATE datasets SET sha256 = ? WHERE _id = 1", [hashlib.sha256(b"old").hexdigest()])
    stands = {"name": "generated/1.png", "generation": "7", "md5Hash": "", "crc32c": "", "size": "3"}
    asked = []

    def there_already(request):
        data = request.get_data()
        if b'"generated/1.png"' not in data:
            return _stored(request)
        asked.append(request.args.get("ifGenerationMatch"))
        if len(asked) == 2:
            png = data[data.index(b"\x89PNG") : data.rindex(b"\r\n--")]
            digest = hashlib.md5(png, usedforsecurity=False).digest()
            stands.update(generation="8", md5Hash=base64.b64encode(digest).decode(), size=str(len(png)))
        return Response("{}", status=412, content_type="application/json")

    httpserver.expect_request(UPLOAD, method="POST").respond_with_handler(there_already)
    looks = re.compile("/storage/v1/b/stub/o/generated.*1.png")
    httpserver.expect_request(looks, method="GET").respond_with_handler(
        lambda request: Response(json.dumps(stands), content_type="application/json")
    )
    httpserver.expect_request(re.compile("/download/storage/v1/b/stub/o/generated.*1.png")).respond_with_data(
        "old", headers={"X-Goog-Generation": "7"}
    )
    finished = job()
    assert finished.returncode == 0, finished.stderr
    assert asked == ["0", "7"]
    assert product.counts(tmp_path) == {"completed": 3}
