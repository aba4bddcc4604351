"""Pictures on Cloud Storage that anybody may read: predefined ACLs, and the URLs to find them by."""

from __future__ import annotations

import pytest

from tests.servers.scripted import ScriptedGcs
from text2img.errors import StorageFailed


@pytest.fixture
def server(httpserver, monkeypatch):
    scripted = ScriptedGcs(httpserver)
    for name, value in scripted.variables.items():
        monkeypatch.setenv(name, value)
    return scripted


@pytest.mark.parametrize(
    ("acl", "sent"),
    [
        (None, None),
        ("private", "private"),
        ("public-read", "publicRead"),
        ("authenticated-read", "authenticatedRead"),
        ("bucket-owner-read", "bucketOwnerRead"),
        ("bucket-owner-full-control", "bucketOwnerFullControl"),
    ],
)
def test_acl_goes_with_the_upload(server, acl, sent):
    """Each name that ``--acl`` takes is sent as Cloud Storage's own, with the upload itself."""
    server.answers(server.done())
    server.put(acl=acl)
    (request,) = server.requests
    assert request.args.get("predefinedAcl") == sent


@pytest.mark.parametrize(
    "answer",
    [
        (400, "Cannot insert legacy ACL for an object when uniform bucket-level access is enabled."),
        (412, "allUsers is not allowed since public access prevention is enforced."),
    ],
)
def test_bucket_without_acls_is_named(server, answer):
    """A bucket that forbids the ACL fails the run, and its 412 is not taken for an object that is there."""
    server.answers(server.refusal(*answer))
    with pytest.raises(StorageFailed, match=r"does not allow --acl public-read; omit it.*IAM policy"):
        server.put(acl="public-read")
    assert len(server.asked) == 1


@pytest.mark.parametrize("enabled", [True, False])
def test_check_finds_a_bucket_without_acls(server, enabled):
    """Uniform access stands in the bucket's metadata: found before anything is made."""
    server.answers(server.stored(iamConfiguration={"uniformBucketLevelAccess": {"enabled": enabled}}))
    place = server.storage(acl="public-read")
    if not enabled:
        place.check()
        return
    with pytest.raises(StorageFailed, match="does not allow --acl"):
        place.check()


def test_public_url_is_percent_encoded(server):
    """``https://storage.googleapis.com/bucket/key``, by RFC 3986."""
    server.answers(server.done())
    said = "https://storage.googleapis.com/bkt/%E6%97%A5%20%E3%81%AE%2B%2525/a%26b/7.png"
    assert server.put(prefix="日 の+%25/a&b", public_urls=True) == said
