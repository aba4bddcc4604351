"""Before Cloud Storage is asked anything: credentials that are missing or broken, and the URL."""

from __future__ import annotations

import os

import pytest

from text2img.errors import ConfigurationError, StorageFailed
from text2img.storage.gcs import GcsStorage


@pytest.fixture
def away(monkeypatch, tmp_path):
    """A machine without an emulator, a login of its own, or a metadata server."""
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    from google.auth.compute_engine import _metadata

    monkeypatch.setattr(_metadata, "is_on_gce", lambda *args, **options: False)
    return monkeypatch


def test_no_credentials_say_how_to_log_in(away):
    """Without any credentials the line names both ways to give some."""
    with pytest.raises(StorageFailed, match="gcloud auth application-default login"):
        GcsStorage("gs://bkt").check()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("folder", "is a folder"),
        (b"not json", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "not a key"),
        (b"{}", "not a key"),
        (b'{"type": "service_account"}', "cannot be used"),
    ],
)
def test_key_that_cannot_be_used(away, tmp_path, content, words):
    """Each way in which a mounted key can be wrong has a line of its own, which names the file."""
    key = tmp_path / "key.json"
    if content == "folder":
        key.mkdir()
    elif content is not None:
        key.write_bytes(content)
    away.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    with pytest.raises(StorageFailed, match=words) as caught:
        GcsStorage("gs://bkt").check()
    assert str(key) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_key_that_this_user_cannot_read(away, tmp_path):
    """A key of another user is named with the user that cannot read it."""
    import text2img.storage.gcs_bucket  # noqa: F401 - the other user may not be able to read it either

    key = tmp_path / "key.json"
    key.touch(mode=0)
    away.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    user = os.geteuid()
    if user == 0:  # who may read every file
        os.seteuid(65534)
    try:
        with pytest.raises(StorageFailed, match=f"user {os.geteuid()} cannot read"):
            GcsStorage("gs://bkt").check()
    finally:
        os.seteuid(user)


# The URL


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("gs://bkt", "gs://bkt/7.png"),
        ("gs://bkt/", "gs://bkt/7.png"),
        ("GS://bkt/a/b/", "gs://bkt/a/b/7.png"),
        (" gs://my.bucket_1-x/日 の ", "gs://my.bucket_1-x/日 の/7.png"),
    ],
)
def test_urls_that_are_read(url, name):
    """Bucket alone or with a prefix, a slash at the end or not."""
    assert GcsStorage(url)._url() + "7.png" == name


@pytest.mark.parametrize(
    "url",
    [
        "gs://",
        "gs:///p",
        "gs://Bucket",
        "gs://b",
        "gs://-b-",
        "gs://bkt..x",
        "gs://bkt?x",
        "gs://bkt:80/p",
        "gs://bkt/a//b",
        "gs://bkt/../x",
        "gs://bkt/.",
        "gs://bkt/a\nb",
        "gs://bkt/a#1",
        "gs://bkt/" + "x" * 900,
        "gs://" + "b" * 64,
        "gs://bkt/" + chr(0xD800),
    ],
)
def test_urls_that_are_not(url):
    """Nonsense is found before any network is touched."""
    with pytest.raises(ConfigurationError, match="--output"):
        GcsStorage(url)
