"""What Cloud Storage and S3 answer, and what the product makes of it: the same scenarios for both.

What only one of the services has is in tests/unit/storage/.
"""

from __future__ import annotations

import socket

import pytest

from tests.servers import free_port
from tests.servers.scripted import ABSENT, DATA, OTHER, ScriptedGcs, ScriptedS3
from text2img.errors import ClaimLost, ErrorCode, ObjectUnreadable, PromptFailed, StorageFailed
from text2img.storage import Existing, StorageOptions, open_bucket
from text2img.storage.bucket import PermanentError

CREATE, REPLACE_ANY = ("store", ABSENT), ("store", None)
LOOK, READ, BUCKET = ("look", None), ("read", None), ("bucket", None)


@pytest.fixture(params=[ScriptedGcs, ScriptedS3], ids=["gcs", "s3"])
def server(request, httpserver, monkeypatch):
    scripted = request.param(httpserver)
    for name, value in scripted.variables.items():
        monkeypatch.setenv(name, value)
    return scripted


def url(server):
    return f"{server.scheme}://bkt/p/7.png"


def at(server, host, monkeypatch):
    """Lead the clients to another host."""
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value.replace(server.host, host))


# Creating, comparing and replacing


def test_created_only_if_absent(server):
    """The first upload may not overwrite, and needs no look before it."""
    server.answers(server.done())
    assert server.put() == url(server)
    assert server.asked == [CREATE]


def test_upload_carries_type_and_sum(server):
    """The content type goes along, and a sum that the server can compare with what came."""
    server.answers(server.done())
    server.put()
    assert server.upload() == ("image/png", DATA, True)


def test_same_content_is_left_alone(server):
    """412, and the object that is there has the same sum: nothing more is sent."""
    server.answers(server.occupied(), server.stored())
    assert server.put() == url(server)
    assert server.asked == [CREATE, LOOK]


def test_other_content_is_replaced_at_its_version(server):
    """A different object gives way to who holds the claim, only while it is the one that was looked at."""
    server.answers(server.occupied(), server.stored(OTHER), server.done())
    assert server.put(lambda: True) == url(server)
    assert server.asked == [CREATE, LOOK, ("store", server.version(OTHER))]


def test_other_content_stays_when_the_claim_is_lost(server):
    """Without the claim nothing is sent after the look."""
    server.answers(server.occupied(), server.stored(OTHER))
    with pytest.raises(ClaimLost):
        server.put()
    assert server.asked == [CREATE, LOOK]


def test_object_that_changes_meanwhile_is_looked_at_again(server):
    """A second 412 means another writer: look again, ask again; here that one wrote the same."""
    asked = []
    server.answers(server.occupied(), server.stored(OTHER), server.occupied(), server.stored())
    server.put(lambda: asked.append(1) or True)
    assert server.asked == [CREATE, LOOK, ("store", server.version(OTHER)), LOOK]
    assert len(asked) == 1


def test_object_that_vanishes_before_the_look_is_created(server):
    """412, then gone: create it."""
    server.answers(server.occupied(), server.gone(), server.done())
    assert server.put() == url(server)
    assert server.asked == [CREATE, LOOK, CREATE]


def test_object_that_keeps_changing_is_given_up(server):
    """A fight over one object ends, as that prompt's failure."""
    server.answers(*[server.occupied(), server.stored(OTHER)] * 5)
    with pytest.raises(PromptFailed, match="keeps changing") as caught:
        server.put(lambda: True)
    assert caught.value.code is ErrorCode.STORAGE_REJECTED


def test_existing_object_is_read_at_the_version_that_is_replaced(server):
    """Looked at, read and replaced at one version: nothing that came in between is lost."""
    shown = []
    server.answers(server.occupied(), server.stored(OTHER), server.content(OTHER), server.done())
    server.put(lambda: True, lambda existing: shown.append(existing) or Existing.OURS)
    at = server.version(OTHER)
    assert server.asked == [CREATE, LOOK, ("read", at), ("store", at)]
    assert shown == [OTHER]


def test_existing_object_that_changes_before_it_is_read_is_looked_at_again(server):
    """412 or 404 to the read: the next upload meets what is there now."""
    for gone in (server.occupied(), server.gone()):
        server.asked.clear()
        server.answers(server.occupied(), server.stored(OTHER), gone, server.done())
        server.put(lambda: True, lambda _: Existing.FOREIGN)
        assert server.asked == [CREATE, LOOK, ("read", server.version(OTHER)), CREATE]


def test_existing_object_that_may_not_be_read_is_replaced_under_the_claim(server):
    """An account that may look but not read cannot compare: it replaces at the version that it saw."""
    server.answers(server.occupied(), server.stored(OTHER), server.refusal(403), server.done())
    server.put(lambda: True, lambda _: Existing.FOREIGN)
    assert server.asked[-1] == ("store", server.version(OTHER))


# Faults that pass, and such that do not


def check_pauses(pauses, retry_timeout):
    """Each wait is twice the one before, up to 16 s, less up to a half by chance, until the timeout ends."""
    waits = [min(0.5 * 2**number, 16) for number in range(len(pauses) + 1)]
    assert all(wait / 2 <= pause <= wait for wait, pause in zip(waits, pauses, strict=False))
    assert sum(pauses) <= retry_timeout < sum(pauses) + waits[-1]


@pytest.mark.parametrize("fault", [408, 429, 500, 502, 503, 504])
def test_faults_that_pass_are_tried_again(server, fault):
    """408, 429 and 5xx are tried again, still create-only, with a wait between that grows."""
    server.answers(server.refusal(fault), server.refusal(fault), server.done())
    assert server.put() == url(server)
    assert server.asked == [CREATE] * 3
    first, second = server.clock.pauses
    assert 0.25 <= first <= 0.5 <= second <= 1


def test_answer_without_words_is_a_fault_that_passes(server):
    """A proxy's page in place of the service's own words: tried again."""
    server.answers((502, b"<html>Bad gateway</html>", {}), server.done())
    assert server.put() == url(server)
    assert server.asked == [CREATE] * 2


def test_upload_whose_answer_was_lost_is_found(server):
    """503 after the object was stored: the next try meets 412 and finds its own content."""
    server.answers(server.refusal(503), server.occupied(), server.stored())
    assert server.put() == url(server)
    assert server.asked == [CREATE, CREATE, LOOK]


def test_upload_changed_on_the_way_is_sent_again(server):
    """A sum that does not match is the connection's fault, not the picture's."""
    server.answers(server.garbled(), server.done())
    assert server.put() == url(server)
    assert server.asked == [CREATE] * 2


@pytest.mark.parametrize("retry_timeout", [1.5, 60])
def test_faults_that_stay_fail_the_run(server, retry_timeout):
    """After the retry timeout it is the storage that fails, with the server's words, and no try is hidden."""
    server.answers(*[server.refusal(503, "on fire")] * 20)
    with pytest.raises(StorageFailed, match=r"503( Refused)?: on fire"):
        server.put(retry_timeout=retry_timeout)
    check_pauses(server.clock.pauses, retry_timeout)
    assert server.asked == [CREATE] * (len(server.clock.pauses) + 1)


def test_no_server_fails_within_the_timeout(server, monkeypatch):
    """Where nobody listens put says so after its retry timeout, and check after 8 seconds."""
    at(server, f"http://127.0.0.1:{free_port()}", monkeypatch)
    with pytest.raises(StorageFailed, match="cannot be reached"):
        server.put(retry_timeout=1)
    check_pauses(server.clock.pauses, 1)
    server.clock.pauses.clear()
    with pytest.raises(StorageFailed, match="cannot be reached"):
        server.storage().check()
    check_pauses(server.clock.pauses, 8)


def test_silent_server_fails_after_its_timeouts(server, monkeypatch):
    """A server that accepts and never answers costs one timeout a try, and is tried for the retry timeout."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at(server, f"http://127.0.0.1:{silent.getsockname()[1]}", monkeypatch)
        with pytest.raises(StorageFailed, match="cannot be reached"):
            server.put(retry_timeout=0.5, timeout=0.05)
    assert len(server.clock.pauses) == 1


# Refusals


@pytest.mark.parametrize("status", [400, 413, 422])
def test_refused_object_is_the_prompts_failure(server, status):
    """What is said of this one object fails this one prompt, at once and in the server's words."""
    server.answers(server.refusal(status, "object name is odd"))
    with pytest.raises(PromptFailed, match=r"could not be stored.*object name is odd") as caught:
        server.put()
    assert caught.value.code is ErrorCode.STORAGE_REJECTED
    assert server.asked == [CREATE]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, r"grant it (storage\.objects\.create|s3:PutObject) .*you may not"),
        (404, "the bucket bkt does not exist"),
        (405, "405 you may not"),
        (409, "409 you may not"),
    ],
)
def test_refused_bucket_fails_the_run(server, status, words):
    """What every object would meet ends the run, at once and in one line that says what to do."""
    server.answers(server.refusal(status, "you may not"))
    with pytest.raises(StorageFailed, match=words) as caught:
        server.put()
    assert "\n" not in str(caught.value)
    assert server.asked == [CREATE]


def test_unaccepted_credentials_fail_the_run(server):
    """401 that no fresh token heals."""
    server.answers(*[server.refusal(401, "Anonymous caller")] * 5)
    with pytest.raises(StorageFailed, match="credentials"):
        server.put()
    assert not server.clock.pauses


# An account that may write but not look


def test_account_that_may_only_write_creates(server):
    """One create each: what is there is never asked for, so that nothing needs a look."""
    server.answers(server.done(), server.done())
    assert server.put() == server.put() == url(server)
    assert server.asked == [CREATE, CREATE]


def test_account_that_may_not_look_replaces_under_its_claim(server):
    """403 to the look: nothing can be compared, so who holds the claim replaces and others stay away."""
    server.answers(server.occupied(), server.refusal(403), server.done())
    assert server.put(lambda: True) == url(server)
    assert server.asked == [CREATE, LOOK, REPLACE_ANY]
    server.answers(server.occupied(), server.refusal(403))
    with pytest.raises(ClaimLost):
        server.put()


def test_account_that_may_only_create_keeps_what_is_there(server):
    """It may not replace: that prompt fails with the permissions to grant, and the run goes on."""
    server.answers(server.occupied(), server.refusal(403), server.refusal(403))
    with pytest.raises(PromptFailed, match=r"grant (storage\.objects\.get and|s3:GetObject)"):
        server.put(lambda: True)
    assert server.asked == [CREATE, LOOK, REPLACE_ANY]


# Reading


def test_read_that_is_cut_off_is_tried_again(server):
    """A connection that ends before all bytes have come: the same again, and nothing of the first is kept."""
    server.answers(server.cut_off(), server.content())
    assert server.storage().read(url(server)) == DATA
    assert server.asked == [READ, READ]
    assert len(server.clock.pauses) == 1


def test_range_is_read_of_one_version(server):
    """So many bytes from there, bound to a version; where another one is there, that is refused."""
    bucket = open_bucket(server.scheme, "bkt", StorageOptions(), 3, clock=server.clock)
    server.answers(server.content(DATA[4:8]), server.occupied())
    assert bucket.read("p/7.png", server.version(DATA), 4, 8) == DATA[4:8]
    assert server.requests[0].headers["Range"] == "bytes=4-7"
    with pytest.raises(PermanentError) as caught:
        bucket.read("p/7.png", server.version(DATA), 8, 11)
    assert caught.value.status == 412
    assert server.asked == [("read", server.version(DATA))] * 2
    assert not server.clock.pauses


@pytest.mark.parametrize(
    ("status", "words"), [(404, "it does not exist"), (403, "this account may not read")]
)
def test_object_that_cannot_be_read(server, status, words):
    """Gone or forbidden is told so, at once; an object without a first byte is an empty one."""
    server.answers(server.refusal(status), server.refusal(416))
    with pytest.raises(ObjectUnreadable, match=words):
        server.storage().read(url(server))
    assert server.storage().read(url(server)) == b""
    assert server.asked == [READ, READ]


# check and try_write


def test_check_passes_for_an_account_that_may_not_look(server):
    """A bucket that is there passes by one request, and so does one that we may not see, without a wait."""
    server.answers(server.done())
    server.storage().check()
    assert server.asked == [BUCKET]
    server.answers(*server.forbidden_to_see_the_bucket())
    server.storage().check()
    assert not server.clock.pauses


@pytest.mark.parametrize(("status", "words"), [(404, "the bucket bkt does not exist"), (409, "409")])
def test_check_fails_where_it_is_plain(server, status, words):
    """A bucket that is not there, or is refused, fails before anything is claimed."""
    server.answers(server.refusal(status))
    with pytest.raises(StorageFailed, match=words):
        server.storage().check()
    assert server.asked == [BUCKET]


def test_try_write_cleans_up(server):
    """The object that doctor stores must be absent, and is deleted in the end."""
    server.answers(*server.trial(), server.done())
    server.storage().check_writable()
    assert (server.asked[0], server.asked[-1]) == (CREATE, ("delete", None))


def test_try_write_names_the_permission_to_delete(server):
    """Stored but not deleted: doctor says which permission is missing."""
    server.answers(*server.trial(), server.refusal(403))
    with pytest.raises(StorageFailed, match=r"grant (storage\.objects\.delete|s3:DeleteObject)"):
        server.storage().check_writable()
