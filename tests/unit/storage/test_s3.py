"""What only S3 answers, scripted, and services that keep no conditions.

What Cloud Storage answers too is in tests/contract/test_scripted_storage.py.
"""

from __future__ import annotations

import logging

import pytest

from tests.servers.scripted import ABSENT, DATA, OTHER, ScriptedS3
from text2img.errors import ClaimLost, ErrorCode, PromptFailed, StorageFailed
from text2img.storage import Existing

CREATE, WRITE, LOOK = ("store", ABSENT), ("store", None), ("look", None)
URL = "s3://bkt/p/7.png"


@pytest.fixture
def server(httpserver, monkeypatch):
    scripted = ScriptedS3(httpserver)
    for name, value in scripted.variables.items():
        monkeypatch.setenv(name, value)
    return scripted


def test_upload_carries_no_acl(server):
    """Unless one is asked for: a bucket that allows none would refuse it."""
    server.answers(server.done())
    server.put()
    (request,) = server.requests
    assert request.get_data() == DATA
    assert not [name for name in request.headers.keys() if name.lower() == "x-amz-acl"]  # noqa: SIM118


@pytest.mark.parametrize(("there", "asked"), [(DATA, 0), (b"the pickets", 1)])
def test_encrypted_object_is_compared_by_its_bytes(server, there, asked):
    """An ETag that is no MD5 (KMS, parts) and the right size: the object itself is read."""
    calls = []
    odd = server.stored(there, etag='"0123-2"')
    server.answers(server.occupied(), odd, odd, server.done())
    assert server.put(lambda: calls.append(1) or True) == URL
    assert server.asked[:3] == [CREATE, LOOK, ("read", '"0123-2"')]
    assert len(calls) == asked


def test_object_that_vanishes_before_it_is_replaced_is_created(server):
    """If-Match on an object that is gone is a 404 on S3: look again, and create it."""
    gone = server.refusal(404, code="NoSuchKey")
    server.answers(server.occupied(), server.stored(OTHER), gone, server.gone(), server.done())
    assert server.put(lambda: True) == URL
    assert server.asked[-1] == CREATE


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (429, "TooManyRequests"),
        (500, "InternalError"),
        (503, "SlowDown"),
        (503, "ServiceUnavailable"),
        (400, "RequestTimeout"),
        (409, "ConditionalRequestConflict"),
    ],
)
def test_codes_that_pass_are_tried_again(server, status, code):
    """What speaks of the moment is tried again, still create-only, whatever its status."""
    fault = server.refusal(status, code=code)
    server.answers(fault, fault, server.done())
    assert server.put() == URL
    assert server.asked == [CREATE] * 3
    assert len(server.clock.pauses) == 2


def test_faults_that_stay_are_named_by_their_code(server):
    """The service's own name for what it keeps answering is in the sentence."""
    server.answers(server.refusal(503, "on fire", "SlowDown"))
    with pytest.raises(StorageFailed, match="503 SlowDown: on fire"):
        server.put(retry_timeout=0)


@pytest.mark.parametrize("answer", [ScriptedS3.refusal(400, code="KeyTooLongError"), (413, b"", {})])
def test_refused_object_is_the_prompts_failure(server, answer):
    """What is said of this one object fails this one prompt, even without words."""
    server.answers(answer)
    with pytest.raises(PromptFailed, match="could not be stored") as caught:
        server.put()
    assert caught.value.code is ErrorCode.STORAGE_REJECTED


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "AccessDenied", "grant it s3:PutObject .*odd"),
        (403, "InvalidAccessKeyId", "credentials .* rejected"),
        (403, "SignatureDoesNotMatch", "credentials .* rejected"),
        (400, "ExpiredToken", "credentials .*odd.*AWS_PROFILE"),
        (404, "NoSuchBucket", "the bucket bkt does not exist"),
        (400, "InvalidRequest", "rejects s3://bkt/p/: 400 odd"),
        (400, "KMS.DisabledException", "400 odd"),
        (409, "InvalidBucketState", "409 odd"),
        (405, "MethodNotAllowed", "405 odd"),
    ],
)
def test_refused_bucket_fails_the_run(server, status, code, words):
    """What by its code every object would meet ends the run in one line that says what to do."""
    server.answers(server.refusal(status, "odd", code))
    with pytest.raises(StorageFailed, match=words) as caught:
        server.put()
    assert "\n" not in str(caught.value)
    assert len(server.asked) == 1


def test_account_that_may_only_create_keeps_what_is_there(server):
    """AccessDenied to the replacement: that prompt fails with the permission to grant."""
    denied = server.refusal(403, code="AccessDenied")
    server.answers(server.occupied(), server.refusal(403), denied)
    with pytest.raises(PromptFailed, match="grant s3:GetObject"):
        server.put(lambda: True)


# Services without conditional writes


def test_service_without_conditions_is_written_to_under_the_claim(server, caplog):
    """501: look first, and write only while the claim holds; the log says so once."""
    lacking = server.refusal(501, code="NotImplemented")
    server.answers(lacking, server.gone(), server.done(), server.gone(), server.done())
    place = server.storage()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            place.put("7.png", DATA, "image/png", lambda: True)
    assert server.asked == [CREATE, LOOK, WRITE, LOOK, WRITE]
    assert caplog.text.count("no conditional writes") == 1


def test_service_without_conditions_is_not_written_to_without_the_claim(server):
    """Not even where nothing is there: nothing says what will be there a moment later."""
    server.answers(server.refusal(501), server.gone())
    with pytest.raises(ClaimLost):
        server.put()


def test_service_without_conditions_leaves_the_same_content_alone(server):
    """What is there and the same is not written again."""
    server.answers(server.refusal(501), server.stored())
    assert server.put() == URL


def test_service_that_can_do_nothing_of_it_fails_the_run(server):
    """501 also without a condition: it is something else that the service lacks."""
    lacking = server.refusal(501, "no ACLs here", "NotImplemented")
    server.answers(server.refusal(501), server.gone(), lacking)
    with pytest.raises(StorageFailed, match="501 no ACLs here"):
        server.put(lambda: True)


# check and try_write


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([ScriptedS3.refusal(403), ScriptedS3.refusal(403, code="InvalidAccessKeyId")], "credentials"),
        ([ScriptedS3.refusal(400), ScriptedS3.refusal(400, code="ExpiredToken")], "credentials"),
        (
            [ScriptedS3.refusal(301, **{"x-amz-bucket-region": "eu-west-1"})] * 4,
            "AWS_DEFAULT_REGION to it: .*eu-west-1",
        ),
        ([ScriptedS3.refusal(501)], "501"),
    ],
)
def test_check_fails_where_it_is_plain(server, answers, words):
    """Keys that are not accepted, another region, an odd service: found before anything is claimed."""
    server.answers(*answers)
    with pytest.raises(StorageFailed, match=words):
        server.storage().check()


def test_try_write_tries_the_condition_and_cleans_up(server):
    """Written, not overwritten by a writer without a claim, deleted; nothing of it is a picture's name."""
    server.answers(*server.trial(), server.done())
    server.storage().check_writable()
    assert server.asked == [CREATE, CREATE, LOOK, ("delete", None)]
    assert server.requests[0].path.startswith("/bkt/p/doctor-")
    assert len({request.path for request in server.requests}) == 1


def test_try_write_finds_a_service_that_ignores_conditions(server):
    """The second writer had no claim and was let through: doctor says so, after it has cleaned up."""
    server.answers(server.done(), server.done(), server.done())
    with pytest.raises(StorageFailed, match="ignores If-None-Match"):
        server.storage().check_writable()
    assert server.asked[-1] == ("delete", None)


def test_try_write_names_the_permission_to_delete(server):
    """Stored, not to be looked at and not deleted: doctor says which permission is missing."""
    denied = server.refusal(403, code="AccessDenied")
    server.answers(server.done(), server.occupied(), server.refusal(403), denied)
    with pytest.raises(StorageFailed, match="s3:DeleteObject"):
        server.storage().check_writable()


def test_object_in_an_archive_is_not_replaced(server):
    """It must be restored before any account can read it: no question of rights, so it stays."""
    cold = server.refusal(403, code="InvalidObjectState")
    server.answers(server.occupied(), server.stored(OTHER), cold)
    with pytest.raises(PromptFailed) as caught:
        server.put(lambda: True, lambda _: Existing.OURS)
    assert caught.value.code is ErrorCode.STORAGE_REJECTED
