"""Pictures on Cloud Storage that anybody may read: predefined ACLs, and the URLs to find them by."""

from __future__ import annotations

import pytest

from tests.unit.test_storage_gcs import DATA, Script, refusal, stored
from text2img.errors import StorageFailed
from text2img.storage import StorageOptions
from text2img.storage.gcs import GcsStorage


@pytest.fixture
def server(httpserver, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", httpserver.url_for("").rstrip("/"))
    return Script(httpserver)


def storage(url="gs://bkt/p", **options):
    return GcsStorage(url, StorageOptions(**options), patience=1, timeout=2)


def put(place):
    return place.put("7.png", DATA, "image/png", lambda: False)


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
def test_acl_goes_with_the_upload(server, httpserver, acl, sent):
    """Each name that ``--acl`` takes is sent as Cloud Storage's own, with the upload itself."""
    server.answers(stored())
    put(storage(acl=acl))
    [(request, _)] = httpserver.log
    assert request.args.get("predefinedAcl") == sent


@pytest.mark.parametrize(
    "answer",
    [
        refusal(400, "Cannot insert legacy ACL for an object when uniform bucket-level access is enabled."),
        refusal(412, "allUsers is not allowed since public access prevention is enforced."),
    ],
)
def test_bucket_without_acls_is_named(server, answer):
    """A bucket that forbids the ACL fails the run, and its 412 is not taken for an object that is there."""
    server.answers(answer)
    with pytest.raises(StorageFailed, match=r"does not allow --acl public-read; leave it out.*IAM policy"):
        put(storage(acl="public-read"))
    assert len(server.asked) == 1


@pytest.mark.parametrize("enabled", [True, False])
def test_check_finds_a_bucket_without_acls(server, enabled):
    """Uniform access stands in the bucket's metadata: found before anything is made."""
    server.answers((200, {"iamConfiguration": {"uniformBucketLevelAccess": {"enabled": enabled}}}))
    place = storage(acl="public-read")
    if not enabled:
        place.check()
        return
    with pytest.raises(StorageFailed, match="does not allow --acl"):
        place.check()


def test_public_url_is_percent_encoded(server):
    """``https://storage.googleapis.com/bucket/key``, by RFC 3986."""
    server.answers(stored())
    place = storage("gs://bkt/日 の+%25/a&b", public_urls=True)
    said = "https://storage.googleapis.com/bkt/%E6%97%A5%20%E3%81%AE%2B%2525/a%26b/7.png"
    assert put(place) == said
