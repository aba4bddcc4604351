"""S3's answers, scripted: conditions, faults that pass, refusals, and services that keep no conditions."""

from __future__ import annotations

import base64
import hashlib
import logging
import threading
import time

import pytest
from werkzeug import Response

from tests.servers import free_port
from tests.unit.s3_script import DATA, Script, done, put, refusal, storage, stored
from text2img.errors import ClaimLost, ErrorCode, PromptFailed, StorageFailed

CREATE = ("PUT", "*")
LOOK = ("HEAD", None)
URL = "s3://bkt/p/7.png"


@pytest.fixture
def server(httpserver, monkeypatch):
    script = Script(httpserver)
    variables = {
        "AWS_ENDPOINT_URL": script.endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_CONFIG_FILE": "/dev/null",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return script


def test_created_only_if_absent(server):
    """The first upload says If-None-Match: *, so that it cannot overwrite, and needs no look before."""
    server.answers(done())
    assert put() == URL
    assert server.asked == [CREATE]


def test_upload_carries_type_and_sum(server):
    """The content type goes along, and an MD5 that the server can compare; no ACL unless one is asked for."""
    server.answers(done())
    put()
    (request,) = server.requests
    assert request.headers["Content-Type"] == "image/png"
    md5 = base64.b64encode(hashlib.md5(DATA).digest()).decode()  # noqa: S324 - what S3 compares
    assert request.headers["Content-MD5"] == md5
    assert request.get_data() == DATA
    assert not [name for name in request.headers.keys() if name.lower() == "x-amz-acl"]  # noqa: SIM118


def test_same_content_is_left_alone(server):
    """412, and the object that is there has the same sum: nothing more is sent."""
    server.answers(refusal(412, "PreconditionFailed"), stored())
    assert put() == URL
    assert server.asked == [CREATE, LOOK]


@pytest.mark.parametrize(("there", "asked"), [(DATA, 0), (b"the pickets", 1)])
def test_encrypted_object_is_compared_by_its_bytes(server, there, asked):
    """An ETag that is no MD5 (KMS, parts) and the right size: the object itself is read."""
    calls = []
    odd = stored(there, etag='"0123-2"')
    server.answers(refusal(412), odd, odd, done())
    assert put(lambda: calls.append(1) or True) == URL
    assert server.asked[:3] == [CREATE, LOOK, ("GET", '"0123-2"')]
    assert len(calls) == asked


def test_other_content_is_replaced_at_its_etag(server):
    """A different object gives way to who holds the claim, only while it is the one that was looked at."""
    other = stored(b"another one")
    server.answers(refusal(412), other, other, done())
    assert put(lambda: True) == URL
    assert server.asked[-1] == ("PUT", other[2]["ETag"])


def test_other_content_stays_when_the_claim_is_lost(server):
    """Without the claim nothing is sent after the look."""
    server.answers(refusal(412), stored(b"of another length"))
    with pytest.raises(ClaimLost):
        put()
    assert server.asked == [CREATE, LOOK]


def test_object_that_changes_meanwhile_is_looked_at_again(server):
    """A second 412 means another writer: look again, ask again; here that one wrote the same."""
    asked = []
    server.answers(refusal(412), stored(b"longer than ours"), refusal(412), stored())
    put(lambda: asked.append(1) or True)
    assert [method for method, _ in server.asked] == ["PUT", "HEAD", "PUT", "HEAD"]
    assert len(asked) == 1


def test_object_that_vanishes_before_the_look_is_created(server):
    """412, then gone: create it."""
    server.answers(refusal(412), refusal(404), done())
    assert put() == URL
    assert server.asked == [CREATE, LOOK, CREATE]


def test_object_that_vanishes_before_it_is_replaced_is_created(server):
    """If-Match on an object that is gone is a 404 on S3: look again, and create it."""
    gone = refusal(404, "NoSuchKey")
    server.answers(refusal(412), stored(b"longer than ours"), gone, refusal(404), done())
    assert put(lambda: True) == URL
    assert server.asked[-1] == CREATE


def test_object_that_keeps_changing_is_given_up(server):
    """A fight over one object ends, as that prompt's failure."""
    server.answers(*[refusal(412), stored(b"longer than ours")] * 5)
    with pytest.raises(PromptFailed, match="keeps changing") as caught:
        put(lambda: True)
    assert caught.value.code is ErrorCode.STORAGE_REJECTED


def test_upload_whose_answer_was_lost_is_found(server):
    """503 after the object was stored: the next try meets 412 and finds its own content."""
    server.answers(refusal(503), refusal(412), stored())
    assert put() == URL


@pytest.mark.parametrize(
    "fault",
    [
        refusal(429, "TooManyRequests"),
        refusal(500, "InternalError"),
        refusal(503, "SlowDown"),
        refusal(503, "ServiceUnavailable"),
        refusal(400, "RequestTimeout"),
        refusal(400, "BadDigest"),
        refusal(409, "ConditionalRequestConflict"),
        (502, b"<html>Bad gateway</html>", {}),
    ],
    ids=lambda fault: f"{fault[0]}",
)
def test_faults_that_pass_are_tried_again(server, fault):
    """What speaks of the moment is tried again, still create-only, with growing waits between."""
    server.answers(fault, fault, done())
    started = time.monotonic()
    assert put() == URL
    assert time.monotonic() - started > 0.7
    assert server.asked == [CREATE] * 3


def test_faults_that_stay_fail_the_run(server):
    """After the patience it is the storage that fails, with the server's words, and no try is hidden."""
    server.answers(*[refusal(503, "SlowDown", "on fire")] * 20)
    started = time.monotonic()
    with pytest.raises(StorageFailed, match="503 SlowDown: on fire"):
        put(patience=1.5)
    assert time.monotonic() - started < 6
    assert 2 <= len(server.asked) <= 5


def test_nobody_there_fails_within_the_patience(server, monkeypatch):
    """Where nobody listens both put and check say so in time."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(StorageFailed, match="cannot be reached"):
        put(patience=1)
    started = time.monotonic()
    with pytest.raises(StorageFailed, match="cannot be reached"):
        storage().check()
    assert time.monotonic() - started < 20


def test_silent_server_fails_within_the_patience(server, httpserver):
    """A server that accepts and never answers costs the patience and one timeout."""
    free = threading.Event()
    httpserver.clear()
    httpserver.expect_request("/bkt/p/7.png").respond_with_handler(lambda _: free.wait(30) and Response())
    started = time.monotonic()
    with pytest.raises(StorageFailed, match="cannot be reached"):
        put(patience=1)
    assert time.monotonic() - started < 15
    free.set()


@pytest.mark.parametrize(
    "answer", [refusal(400), refusal(400, "KeyTooLongError"), (413, b"", {}), refusal(422)]
)
def test_refused_object_is_the_prompts_failure(server, answer):
    """What is said of this one object fails this one prompt."""
    server.answers(answer)
    with pytest.raises(PromptFailed, match="could not be stored") as caught:
        put()
    assert caught.value.code is ErrorCode.STORAGE_REJECTED


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (refusal(403, "AccessDenied", "you may not"), "grant it s3:PutObject .*you may not"),
        (refusal(403, "InvalidAccessKeyId"), "credentials .* not accepted"),
        (refusal(403, "SignatureDoesNotMatch"), "credentials .* not accepted"),
        (refusal(400, "ExpiredToken", "it expired"), "credentials .*it expired.*AWS_PROFILE"),
        (refusal(404, "NoSuchBucket"), "the bucket bkt does not exist"),
        (refusal(400, "InvalidRequest", "odd"), "refuses s3://bkt/p/: 400 odd"),
        (refusal(400, "KMS.DisabledException", "key off"), "400 key off"),
        (refusal(409, "InvalidBucketState", "odd"), "409 odd"),
        (refusal(405, "MethodNotAllowed", "odd"), "405 odd"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[1].decode().split("<Code>")[1].split("<")[0],
)
def test_refused_bucket_fails_the_run(server, answer, words):
    """What every object would meet ends the run in one line that says what to do."""
    server.answers(answer)
    with pytest.raises(StorageFailed, match=words) as caught:
        put()
    assert "\n" not in str(caught.value)
    assert len(server.asked) == 1


# An account that may write but neither read nor list


def test_account_that_may_only_write_creates(server):
    """One conditional create each: what is there is never asked for, so that nothing needs a look."""
    server.answers(done(), done())
    assert put() == put() == URL
    assert server.asked == [CREATE, CREATE]


def test_account_that_may_not_look_replaces_under_its_claim(server):
    """403 to the look: nothing can be compared, so who holds the claim replaces and others stay away."""
    server.answers(refusal(412), refusal(403), done())
    assert put(lambda: True) == URL
    assert server.asked == [CREATE, LOOK, ("PUT", None)]
    server.answers(refusal(412), refusal(403))
    with pytest.raises(ClaimLost):
        put()


def test_account_that_may_only_create_keeps_what_is_there(server):
    """It may not replace: that prompt fails with the permission to grant, and the run goes on."""
    server.answers(refusal(412), refusal(403), refusal(403, "AccessDenied"))
    with pytest.raises(PromptFailed, match="grant s3:GetObject"):
        put(lambda: True)


# Services without conditional writes


def test_service_without_conditions_is_written_to_under_the_claim(server, caplog):
    """501: look first, and write only while the claim holds; the log says so once."""
    server.answers(refusal(501, "NotImplemented"), refusal(404), done(), refusal(404), done())
    place = storage()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            place.put("7.png", DATA, "image/png", lambda: True)
    assert server.asked == [CREATE, LOOK, ("PUT", None), LOOK, ("PUT", None)]
    assert caplog.text.count("no conditional writes") == 1


def test_service_without_conditions_is_not_written_to_without_the_claim(server):
    """Not even where nothing is there: nobody can say what will be there a moment later."""
    server.answers(refusal(501), refusal(404))
    with pytest.raises(ClaimLost):
        put()


def test_service_without_conditions_leaves_the_same_content_alone(server):
    """What is there and the same is not written again."""
    server.answers(refusal(501), stored())
    assert put() == URL


def test_service_that_can_do_nothing_of_it_fails_the_run(server):
    """501 also without a condition: it is something else that the service lacks."""
    server.answers(refusal(501), refusal(404), refusal(501, "NotImplemented", "no ACLs here"))
    with pytest.raises(StorageFailed, match="501 no ACLs here"):
        put(lambda: True)


# check and try_write


@pytest.mark.parametrize("answers", [[done()], [refusal(403), refusal(403, "AccessDenied")]])
def test_check_passes_for_an_account_that_may_not_look(server, answers):
    """A bucket that is there passes, and so does one that we may neither see nor list."""
    server.answers(*answers)
    storage().check()
    assert len(server.asked) == len(answers)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([refusal(404)], "the bucket bkt does not exist"),
        ([refusal(403), refusal(403, "InvalidAccessKeyId")], "credentials"),
        ([refusal(400), refusal(400, "ExpiredToken")], "credentials"),
        ([refusal(301, **{"x-amz-bucket-region": "eu-west-1"})] * 4, "AWS_DEFAULT_REGION: .*eu-west-1"),
        ([refusal(501)], "501"),
    ],
)
def test_check_fails_where_it_is_plain(server, answers, words):
    """No such bucket, keys that are not accepted, another region: found before anything is claimed."""
    server.answers(*answers)
    with pytest.raises(StorageFailed, match=words):
        storage().check()


def test_try_write_tries_the_condition_and_cleans_up(server):
    """Written, not overwritten by a writer without a claim, deleted; nothing of it is a picture's name."""
    server.answers(done(), refusal(412), stored(b"text2img doctor"), done())
    storage().try_write()
    assert [method for method, _ in server.asked] == ["PUT", "PUT", "HEAD", "DELETE"]
    assert server.requests[0].path.startswith("/bkt/p/doctor-")
    assert len({request.path for request in server.requests}) == 1


def test_try_write_finds_a_service_that_ignores_conditions(server):
    """The second writer had no claim and was let through: doctor says so, after it has cleaned up."""
    server.answers(done(), done(), done())
    with pytest.raises(StorageFailed, match="ignores If-None-Match"):
        storage().try_write()
    assert server.asked[-1][0] == "DELETE"


def test_try_write_names_the_permission_to_delete(server):
    """Stored but not deleted: doctor says which permission is missing."""
    server.answers(done(), refusal(412), refusal(403), refusal(403, "AccessDenied"))
    with pytest.raises(StorageFailed, match="s3:DeleteObject"):
        storage().try_write()
