"""Cloud Storage's answers, scripted: preconditions, faults that pass, refusals, and missing credentials."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time

import pytest
from werkzeug import Response

from tests.servers import free_port
from text2img.errors import ClaimLost, ErrorCode, PromptFailed, StorageFailed
from text2img.storage.gcs import GcsStorage

DATA = b"the picture"


class Script:
    """A Cloud Storage that gives its answers in order, and remembers what was asked."""

    def __init__(self, httpserver):
        self.asked, self._answers = [], []
        httpserver.expect_request(re.compile("/(upload/)?storage/v1/b/bkt.*")).respond_with_handler(
            self._answer
        )

    def answers(self, *answers):
        self._answers = list(answers)

    def _answer(self, request):
        self.asked.append((request.method, request.args.get("ifGenerationMatch")))
        status, body = self._answers.pop(0)
        return Response(json.dumps(body), status=status, content_type="application/json")


@pytest.fixture
def server(httpserver, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", httpserver.url_for("").rstrip("/"))
    return Script(httpserver)


def refusal(status, message="no"):
    return status, {"error": {"code": status, "message": message}}


def stored(data=DATA, generation=11, **fields):
    md5 = base64.b64encode(hashlib.md5(data).digest()).decode()  # noqa: S324 - what Cloud Storage reports
    found = {"name": "p/7.png", "bucket": "bkt", "generation": str(generation), "size": str(len(data))}
    return 200, found | {"md5Hash": md5} | fields


def put(may_replace=lambda: False, patience=3.0):
    storage = GcsStorage("gs://bkt/p", patience=patience, timeout=2)
    return storage.put("7.png", DATA, "image/png", may_replace)


def test_created_only_if_absent(server):
    """The first upload names generation 0, so that it cannot overwrite."""
    server.answers(stored())
    assert put() == "gs://bkt/p/7.png"
    assert server.asked == [("POST", "0")]


def test_same_content_is_left_alone(server):
    """412, and the object that is there has the same sum: nothing more is sent."""
    server.answers(refusal(412), stored())
    assert put() == "gs://bkt/p/7.png"
    assert server.asked == [("POST", "0"), ("GET", None)]


def test_composed_object_is_compared_by_crc32c(server):
    """An object without an MD5 is known by its CRC32C."""
    server.answers(refusal(412), stored(md5Hash=None, crc32c="qBOahw=="), stored())
    other = put(lambda: True)
    assert other == "gs://bkt/p/7.png"
    assert len(server.asked) == 3
    import google_crc32c

    crc = base64.b64encode(google_crc32c.value(DATA).to_bytes(4, "big")).decode()
    server.answers(refusal(412), stored(md5Hash=None, crc32c=crc))
    assert put() == "gs://bkt/p/7.png"


def test_other_content_is_replaced_at_its_generation(server):
    """A different object gives way to who holds the claim, only while it is the one that was looked at."""
    server.answers(refusal(412), stored(b"another", 11), stored())
    assert put(lambda: True) == "gs://bkt/p/7.png"
    assert server.asked == [("POST", "0"), ("GET", None), ("POST", "11")]


def test_other_content_stays_when_the_claim_is_lost(server):
    """Without the claim nothing is sent after the look."""
    server.answers(refusal(412), stored(b"another"))
    with pytest.raises(ClaimLost):
        put()
    assert server.asked == [("POST", "0"), ("GET", None)]


def test_object_that_changes_meanwhile_is_looked_at_again(server):
    """A second 412 means another writer: look again, ask again; here that one wrote the same."""
    asked = []
    server.answers(refusal(412), stored(b"another", 11), refusal(412), stored(DATA, 12))
    put(lambda: asked.append(1) or True)
    assert [generation for _, generation in server.asked] == ["0", None, "11", None]
    assert len(asked) == 1


def test_object_that_vanishes_meanwhile_is_created(server):
    """412, then gone: create it."""
    server.answers(refusal(412), refusal(404), stored())
    assert put() == "gs://bkt/p/7.png"
    assert [generation for _, generation in server.asked] == ["0", None, "0"]


def test_object_that_keeps_changing_is_given_up(server):
    """A fight over one object ends, as that prompt's failure."""
    server.answers(*[refusal(412), stored(b"another")] * 5)
    with pytest.raises(PromptFailed, match="keeps changing") as caught:
        put(lambda: True)
    assert caught.value.code is ErrorCode.STORAGE_REJECTED


def test_upload_whose_answer_was_lost_is_found(server):
    """503 after the object was stored: the next try meets 412 and finds its own content."""
    server.answers(refusal(503), refusal(412), stored())
    assert put() == "gs://bkt/p/7.png"


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, 504])
def test_faults_that_pass_are_tried_again(server, fault):
    """408, 429 and 5xx are tried again, still create-only, with a wait between."""
    server.answers(refusal(fault), refusal(fault), stored())
    started = time.monotonic()
    assert put() == "gs://bkt/p/7.png"
    assert time.monotonic() - started > 0.7
    assert server.asked == [("POST", "0")] * 3


def test_upload_changed_on_the_way_is_sent_again(server):
    """A checksum that does not match is the connection's fault, not the picture's."""
    changed = refusal(400, 'Provided CRC32C "a" doesn\'t match calculated CRC32C "b".')
    server.answers(changed, stored())
    assert put() == "gs://bkt/p/7.png"


def test_upload_carries_a_checksum(server, httpserver):
    """The server can compare what it got with what was sent; the content type goes along."""
    server.answers(stored())
    put()
    [(request, _)] = httpserver.log
    sent = request.get_data()
    assert b'"crc32c": "' in sent or b'"md5Hash": "' in sent
    assert b"content-type: image/png" in sent


def test_faults_that_stay_fail_the_run(server):
    """After the patience it is the storage that fails, with the server's words."""
    server.answers(*[refusal(503, "on fire")] * 20)
    started = time.monotonic()
    with pytest.raises(StorageFailed, match="503: on fire"):
        put(patience=1.5)
    assert time.monotonic() - started < 4


def test_nobody_there_fails_within_the_patience(monkeypatch):
    """Where nobody listens both put and check say so in time."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    with pytest.raises(StorageFailed, match="cannot be reached"):
        put(patience=1)
    with pytest.raises(StorageFailed, match="cannot be reached"):
        GcsStorage("gs://bkt/p").check()
    assert time.monotonic() - started < 14


def test_silent_server_fails_within_the_patience(server, httpserver):
    """A server that accepts and never answers costs the patience and one timeout."""
    free = threading.Event()
    httpserver.clear()
    httpserver.expect_request("/upload/storage/v1/b/bkt/o").respond_with_handler(
        lambda _: free.wait(20) and Response()
    )
    started = time.monotonic()
    with pytest.raises(StorageFailed, match="cannot be reached"):
        put(patience=1)
    assert time.monotonic() - started < 6
    free.set()


@pytest.mark.parametrize("status", [400, 413, 422])
def test_refused_object_is_the_prompts_failure(server, status):
    """What is said of this one object fails this one prompt, in the server's words."""
    server.answers(refusal(status, "object name is odd"))
    with pytest.raises(PromptFailed, match="object name is odd") as caught:
        put()
    assert caught.value.code is ErrorCode.STORAGE_REJECTED


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (refusal(403, "x does not have storage.objects.create access"), "grant it storage.objects.create"),
        (refusal(404), "the bucket bkt does not exist"),
        (refusal(400, "Bucket is a requester pays bucket but no user project provided."), "requester pays"),
        (refusal(409, "odd"), "409 odd"),
    ],
)
def test_refused_bucket_fails_the_run(server, answer, words):
    """What every object would meet ends the run in one line that says what to do."""
    server.answers(answer)
    with pytest.raises(StorageFailed, match=words) as caught:
        put()
    assert "\n" not in str(caught.value)


def test_unaccepted_credentials_fail_the_run(server):
    """401 that no fresh token heals."""
    server.answers(*[refusal(401, "Anonymous caller")] * 5)
    with pytest.raises(StorageFailed, match="credentials"):
        put()


def test_account_that_may_not_look_replaces_under_its_claim(server):
    """Without storage.objects.get nothing can be compared: who holds the claim replaces, others stay away."""
    server.answers(refusal(412), refusal(403), stored())
    assert put(lambda: True) == "gs://bkt/p/7.png"
    assert server.asked == [("POST", "0"), ("GET", None), ("POST", None)]
    server.answers(refusal(412), refusal(403))
    with pytest.raises(ClaimLost):
        put()


@pytest.mark.parametrize("looks", [refusal(403), stored(b"another")])
def test_account_that_may_only_create_keeps_what_is_there(server, looks):
    """It may not replace: that prompt fails with the permissions to grant, and the run goes on."""
    denied = refusal(403, "x does not have storage.objects.delete access")
    server.answers(denied, looks, denied)
    with pytest.raises(PromptFailed, match=r"storage\.objects\.get and storage\.objects\.delete"):
        put(lambda: True)


# check and try_write


def test_check_passes_for_an_account_that_may_not_look(server):
    """200 and 403 pass, one request each."""
    server.answers((200, {}), refusal(403))
    GcsStorage("gs://bkt").check()
    GcsStorage("gs://bkt").check()


@pytest.mark.parametrize(("answer", "words"), [(refusal(404), "does not exist"), (refusal(400), "400")])
def test_check_fails_where_it_is_plain(server, answer, words):
    """A bucket that is not there fails before anything is claimed."""
    server.answers(answer)
    with pytest.raises(StorageFailed, match=words):
        GcsStorage("gs://bkt").check()


def test_try_write_names_the_permission_to_delete(server):
    """Stored but not deleted: doctor says which permission is missing."""
    server.answers(stored(), refusal(403))
    with pytest.raises(StorageFailed, match=r"storage\.objects\.delete"):
        GcsStorage("gs://bkt").try_write()
