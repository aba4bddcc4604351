"""What only Cloud Storage answers, scripted.

What S3 answers too is in tests/contract/test_scripted_storage.py.
"""

from __future__ import annotations

import base64

import google_crc32c
import pytest

from tests.servers.scripted import ABSENT, DATA, OTHER, ScriptedGcs
from text2img.errors import PromptFailed, StorageFailed

CREATE, LOOK = ("store", ABSENT), ("look", None)
NO_DELETE = "x does not have storage.objects.delete access"


@pytest.fixture
def server(httpserver, monkeypatch):
    scripted = ScriptedGcs(httpserver)
    for name, value in scripted.variables.items():
        monkeypatch.setenv(name, value)
    return scripted


def test_composed_object_is_compared_by_crc32c(server):
    """An object without an MD5 is known by its CRC32C."""
    server.answers(server.occupied(), server.stored(md5Hash=None, crc32c="qBOahw=="), server.done())
    assert server.put(lambda: True) == "gs://bkt/p/7.png"
    assert len(server.asked) == 3
    crc = base64.b64encode(google_crc32c.value(DATA).to_bytes(4, "big")).decode()
    server.answers(server.occupied(), server.stored(md5Hash=None, crc32c=crc))
    assert server.put() == "gs://bkt/p/7.png"


def test_bucket_whose_requester_pays_fails_the_run(server):
    """A 400 that every object would get is not taken for this one's."""
    server.answers(server.refusal(400, "Bucket is a requester pays bucket but no user project provided."))
    with pytest.raises(StorageFailed, match="requester pays"):
        server.put()


def test_missing_permission_to_replace_may_come_before_the_precondition(server):
    """403 in place of 412: for an account that may not delete there is an object, which is looked at."""
    server.answers(server.refusal(403, NO_DELETE), server.stored())
    assert server.put() == "gs://bkt/p/7.png"
    assert server.asked == [CREATE, LOOK]


@pytest.mark.parametrize("looks", [403, 200])
def test_account_that_may_only_create_keeps_what_is_there(server, looks):
    """It may not replace: that prompt fails with the permissions to grant, and the run goes on."""
    denied = server.refusal(403, NO_DELETE)
    server.answers(denied, server.stored(OTHER) if looks == 200 else server.refusal(looks), denied)
    with pytest.raises(PromptFailed, match=r"storage\.objects\.get and storage\.objects\.delete"):
        server.put(lambda: True)


def test_check_names_an_odd_refusal(server):
    """400 to the question for the bucket's metadata fails before anything is claimed."""
    server.answers(server.refusal(400))
    with pytest.raises(StorageFailed, match="400"):
        server.storage().check()
