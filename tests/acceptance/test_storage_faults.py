"""A storage that refuses or falters: what the whole job makes of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from itertools import pairwise

import pytest
from werkzeug import Response

from tests.acceptance import product

DATABASE = ("--database", "sqlite:///prompts.db")
JOB = (*DATABASE, "--gcs-bucket", "stub", "--model-id", str(product.MODEL), "--num-inference-steps", "2")
UPLOAD = re.compile("/upload/storage/v1/b/stub/o")


@pytest.fixture
def job(tmp_path, httpserver):
    """Three pending prompts and a bucket that is there; returns a function that runs the job."""
    (tmp_path / "prompts.jsonl").write_text(
        "\n".join(json.dumps({"id": n, "text": "a large red circle on a blue background"}) for n in range(3))
    )
    assert product.run("enqueue", *DATABASE, "prompts.jsonl", folder=tmp_path).returncode == 0
    httpserver.expect_request("/storage/v1/b/stub").respond_with_json({"name": "stub"})
    host = httpserver.url_for("").rstrip("/")
    return lambda: product.run(*JOB, folder=tmp_path, STORAGE_EMULATOR_HOST=host)


def _stored(request):
    name = re.search(rb'"name": "([^"]+)"', request.get_data())[1].decode()
    return Response(json.dumps({"name": name, "generation": "1"}), content_type="application/json")


def _status(tmp_path):
    lines = product.run("status", *DATABASE, folder=tmp_path).stdout.splitlines()
    return {line.split()[0]: int(line.split()[1]) for line in lines[:4]}


@pytest.mark.slow
def test_a_bucket_that_refuses_every_write_fails_the_run(job, tmp_path, httpserver):
    """403 to every write: one clear line, status 1, all prompts pending at once, none marked as failed."""
    httpserver.expect_request(UPLOAD, method="POST").respond_with_data("", status=403)
    finished = job()
    assert finished.returncode == 1, finished.stderr
    assert "storage.objects.create" in json.loads(product.errors(finished)[-1])["message"]
    assert _status(tmp_path) == {"pending": 3, "processing": 0, "completed": 0, "error": 0}


@pytest.mark.slow
def test_one_object_that_is_refused_is_that_prompts_error(job, tmp_path, httpserver):
    """400 to one object: that prompt ends in ``storage_rejected``, the others complete, status 3."""

    def picky(request):
        return Response("", status=400) if b'"generated/1.png"' in request.get_data() else _stored(request)

    httpserver.expect_request(UPLOAD, method="POST").respond_with_handler(picky)
    finished = job()
    assert finished.returncode == 3, finished.stderr
    assert _status(tmp_path) == {"pending": 0, "processing": 0, "completed": 2, "error": 1}
    assert "storage_rejected 1" in product.run("status", *DATABASE, folder=tmp_path).stdout


@pytest.mark.slow
@pytest.mark.parametrize("code", [429, 503])
def test_a_bucket_that_is_busy_is_asked_again(job, tmp_path, httpserver, code):
    """429 and 503 are tried again until they pass, each time after a longer wait; the run knows nothing but
    success.
    """
    asked = []

    def busy(request):
        if b'"generated/1.png"' in request.get_data() and len(asked) < 5:
            asked.append(time.monotonic())
            return Response("", status=code)
        return _stored(request)

    httpserver.expect_request(UPLOAD, method="POST").respond_with_handler(busy)
    finished = job()
    assert finished.returncode == 0, finished.stderr
    assert _status(tmp_path) == {"pending": 0, "processing": 0, "completed": 3, "error": 0}
    waits = [later - sooner for sooner, later in pairwise(asked)]
    assert waits[-1] > 2 * waits[0]  # 0.25 to 0.5 s, and after three doublings 2 to 4 s


@pytest.mark.slow
def test_an_object_that_is_there_already_is_replaced_by_who_holds_the_claim(job, tmp_path, httpserver):
    """412 to a first upload: what is there is looked at, and another picture gives way at the generation that
    was looked at; 412 to that as well, and by then the same picture is there: it is left alone.
    """
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
    finished = job()
    assert finished.returncode == 0, finished.stderr
    assert asked == ["0", "7"]
    assert _status(tmp_path) == {"pending": 0, "processing": 0, "completed": 3, "error": 0}
