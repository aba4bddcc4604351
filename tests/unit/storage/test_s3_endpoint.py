"""What S3 is told of places and people: URLs, endpoints, ACLs, public URLs, credentials."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.clock import Clock
from tests.servers.scripted import ScriptedS3
from text2img.errors import ConfigurationError, StorageFailed
from text2img.storage import StorageOptions, open_storage
from text2img.storage.s3 import S3Storage

VARIABLES = ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")


@pytest.fixture
def away(monkeypatch, tmp_path):
    """A machine that knows nothing of AWS."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    return monkeypatch


@pytest.fixture
def known(away):
    """The same with keys."""
    away.setenv("AWS_ACCESS_KEY_ID", "key")
    away.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return away


@pytest.fixture
def server(httpserver, known):
    scripted = ScriptedS3(httpserver)
    known.setenv("AWS_ENDPOINT_URL", scripted.host)
    return scripted


# The URL


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("s3://bkt", "s3://bkt/7.png"),
        ("s3://bkt/", "s3://bkt/7.png"),
        ("S3://bkt/a/b/", "s3://bkt/a/b/7.png"),
        (" s3://my.bucket-1x/日 の ", "s3://my.bucket-1x/日 の/7.png"),
    ],
)
def test_urls_that_are_read(url, name):
    """Bucket alone or with a prefix, a slash at the end or not."""
    assert S3Storage(url)._url() + "7.png" == name


@pytest.mark.parametrize(
    "url",
    [
        *("s3://", "s3:///p", "s3://Bucket", "s3://my_bucket", "s3://b", "s3://bk", "s3://-b-", "s3://bkt-"),
        *("s3://bkt..x", "s3://192.168.5.4", "s3://bkt?x", "s3://bkt:80/p", "s3://" + "b" * 64),
        *("s3://key:secret@bkt/p", "s3://bkt/a//b", "s3://bkt/../x", "s3://bkt/.", "s3://bkt/a\nb"),
        *("s3://bkt/" + "x" * 900, "s3://bkt/" + chr(0xD800)),
    ],
)
def test_urls_that_are_not(url):
    """Names that no bucket has, and odd prefixes, are found before any network is touched."""
    with pytest.raises(ConfigurationError, match="--output"):
        S3Storage(url)


@pytest.mark.parametrize(
    "endpoint",
    ["minio:9000", "s3.example.com", "https://", "https://me:pass-word@host", "http://h/?key=pass-word"],
)
def test_endpoints_that_are_none(endpoint):
    """An endpoint is a plain http URL; a password in it is refused and not repeated."""
    with pytest.raises(ConfigurationError, match="--s3-endpoint") as caught:
        open_storage("s3://bkt", StorageOptions(s3_endpoint=endpoint))
    assert "pass-word" not in str(caught.value)


def test_opening_imports_no_boto3():
    """To read the URL costs no vendor's library: a run with nothing to do never loads it."""
    program = (
        "import sys\n"
        "from text2img.storage import open_storage\n"
        "open_storage('s3://bkt/p')\n"
        "assert not {'boto3', 'botocore'} & set(sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_given_endpoint_beats_the_variable(known, httpserver):
    """``--s3-endpoint`` is where requests go, whatever AWS_ENDPOINT_URL says."""
    scripted = ScriptedS3(httpserver)
    known.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    scripted.answers(scripted.done())
    assert scripted.put(s3_endpoint=scripted.host) == "s3://bkt/p/7.png"


# ACLs


def test_acl_goes_with_every_upload(server):
    """The canned ACL is a header of the upload itself: no moment in which the object has another."""
    server.answers(server.occupied(), server.gone(), server.done())
    server.put(acl="public-read")
    writes = [request for request in server.requests if request.method == "PUT"]
    assert [request.headers["x-amz-acl"] for request in writes] == ["public-read"] * 2


def test_bucket_without_acls_is_named(server):
    """A bucket that forbids ACLs fails the run, not the prompt, and says what to do instead."""
    server.answers(
        server.refusal(400, "The bucket does not allow ACLs", code="AccessControlListNotSupported")
    )
    with pytest.raises(StorageFailed, match=r"bkt allows no ACLs; omit --acl.*policy"):
        server.put(acl="public-read")


def test_forbidden_acl_is_told_from_forbidden_writing(server):
    """403 with an ACL: both permissions and Block Public Access are named."""
    server.answers(server.refusal(403, code="AccessDenied"))
    with pytest.raises(StorageFailed, match=r"s3:PutObjectAcl.*Block Public Access"):
        server.put(acl="public-read")


@pytest.mark.parametrize(("acl", "passes"), [("public-read", False), ("bucket-owner-full-control", True)])
def test_check_finds_a_bucket_without_acls(server, acl, passes):
    """Object ownership that rules ACLs out is found before anything is made, where the account may ask."""
    enforced = b"<OwnershipControls><Rule><ObjectOwnership>BucketOwnerEnforced</ObjectOwnership></Rule>"
    server.answers(server.done(), (200, enforced + b"</OwnershipControls>", {}))
    place = server.storage(acl=acl)
    if passes:
        place.check()
    else:
        with pytest.raises(StorageFailed, match="allows no ACLs"):
            place.check()


def test_check_passes_where_nobody_may_ask_of_acls(server):
    """An account or a service that says nothing of ownership passes."""
    server.answers(server.done(), server.refusal(403))
    server.storage(acl="public-read").check()


# Public URLs


@pytest.mark.parametrize(
    ("bucket", "region", "url"),
    [
        ("bkt", "us-east-1", "https://bkt.s3.amazonaws.com/p/7.png"),
        ("bkt", "eu-central-1", "https://bkt.s3.amazonaws.com/p/7.png"),
        ("my.bkt", "eu-central-1", "https://s3.eu-central-1.amazonaws.com/my.bkt/p/7.png"),
        ("bkt", "cn-north-1", "https://s3.cn-north-1.amazonaws.com.cn/bkt/p/7.png"),
    ],
)
def test_public_url_on_amazon(known, bucket, region, url):
    """The bucket's own host; with dots in its name, or in China, as S3 is addressed there."""
    known.setenv("AWS_DEFAULT_REGION", region)
    assert S3Storage(f"s3://{bucket}/p")._bucket().public_url("p/7.png") == url


def test_public_url_of_a_service_with_buckets_as_hosts(known, tmp_path):
    """Where AWS's configuration says so, the bucket is part of the host."""
    (tmp_path / "config").write_text("[default]\ns3 =\n    addressing_style = virtual\n")
    place = S3Storage("s3://bkt", StorageOptions(s3_endpoint="https://s3.example.com:9000/"))
    assert place._bucket().public_url("7.png") == "https://bkt.s3.example.com:9000/7.png"


# Credentials


def test_missing_credentials_are_named(away):
    """Nothing is known of AWS: a line that says how to log in, at once, without another try."""
    clock = Clock()
    with pytest.raises(StorageFailed, match=r"no AWS credentials.*AWS_ACCESS_KEY_ID.*AWS_PROFILE"):
        S3Storage("s3://bkt", clock=clock).check()
    assert not clock.pauses


def test_half_a_pair_of_keys_is_named(away):
    """A key without its secret is not taken for none, and is not shown."""
    away.setenv("AWS_ACCESS_KEY_ID", "half-of-it")
    with pytest.raises(StorageFailed, match="Partial credentials") as caught:
        S3Storage("s3://bkt").check()
    assert "half-of-it" not in str(caught.value)


def test_missing_profile_is_named(away):
    """A profile that is in no file."""
    away.setenv("AWS_PROFILE", "nights")
    with pytest.raises(StorageFailed, match="nights"):
        S3Storage("s3://bkt").check()


@pytest.fixture
def role(server, known, tmp_path):
    """A profile whose keys come from a role, for which the scripted server is asked."""
    (tmp_path / "config").write_text(
        "[profile nights]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = source\n"
        "region = us-east-1\n"
        "[profile source]\naws_access_key_id = key\naws_secret_access_key = secret\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        known.delenv(name)
    known.setenv("AWS_PROFILE", "nights")
    return server


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (b"<ErrorResponse><Error><Message>not this role</Message></Error></ErrorResponse>", "not this role"),
        (b"please pay", "cannot be reached"),
    ],
)
def test_role_that_is_refused_is_no_missing_permission(role, httpserver, told, words):
    """403 from where credentials come from must not pass for an account that may only write."""
    httpserver.expect_request("/").respond_with_data(told, status=403)
    with pytest.raises(StorageFailed, match=words) as caught:
        role.storage().check()
    assert "please pay" not in str(caught.value)
    assert not role.asked
