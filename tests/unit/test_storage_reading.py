"""Pictures read back from wherever their URLs say, and from nowhere that they must not."""

from __future__ import annotations

import time

import pytest

from tests.servers import free_port
from text2img.errors import StorageFailed, Unreadable
from text2img.storage import StorageOptions, open_storage
from text2img.storage.reading import Reader


class Deaf:
    """A storage where nobody answers; it counts who asks."""

    def __init__(self):
        self.asked = 0

    def read(self, url):
        self.asked += 1
        raise StorageFailed("nobody answers")


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures, and one beside it."""
    for name in ("pictures", "others"):
        open_storage(str(tmp_path / name)).put("7.png", name.encode(), "image/png", lambda: False)
    return tmp_path


def test_files_are_read_where_their_paths_say(folder):
    """Of any folder where no output is named, of that one alone where it is."""
    anywhere = Reader(None, StorageOptions())
    within = Reader(open_storage(str(folder / "pictures")), StorageOptions())
    for name in ("pictures", "others"):
        assert anywhere.read(f"{folder}/{name}/7.png") == name.encode()
    assert within.read(f"{folder}/pictures/7.png") == b"pictures"
    with pytest.raises(Unreadable, match="name where it is by --output"):
        within.read(f"{folder}/others/7.png")


@pytest.mark.parametrize(
    "url",
    ["/etc/hostname", "/etc/passwd\0.png", "7.png", "", "javascript:alert(1)", "https://example.com/7.png",
     "file:///etc/passwd.png", "ftp://h/7.png", "gs://Not A Bucket/7.png", "gs:///7.png", "s3://..//7.png"],
)  # fmt: skip
def test_nothing_else_is_touched(url):
    """What is no picture's path and no bucket's URL is refused before any file or network is touched."""
    with pytest.raises(Unreadable):
        Reader(None, StorageOptions()).read(url)


@pytest.mark.parametrize("kind", ["gcs", "s3"])
def test_buckets_are_read_where_the_urls_say(kind, request):
    """By the bucket's own scheme, and on Cloud Storage by its public URL as well."""
    server = request.getfixturevalue(kind)
    scheme = {"gcs": "gs", "s3": "s3"}[kind]
    storage = open_storage(f"{scheme}://{server.bucket}/reading")
    url = storage.put("a 7.png", b"picture", "image/png", lambda: True)
    reader = Reader(None, StorageOptions())
    assert reader.read(url) == b"picture"
    if kind == "gcs":
        public = f"https://storage.googleapis.com/{server.bucket}/reading/a%207.png"
        assert reader.read(public) == b"picture"
    with pytest.raises(Unreadable, match="not there"):
        reader.read(url.replace("7.png", "8.png"))


def test_a_place_that_does_not_answer_is_asked_once():
    """Every further picture of it has the same reason at once."""
    deaf = Deaf()
    reader = Reader(deaf, StorageOptions())
    for _ in range(3):
        with pytest.raises(Unreadable, match="nobody answers"):
            reader.read("gs://b/7.png")
    assert deaf.asked == 1


def test_a_server_that_does_not_answer_takes_its_patience_once(s3, monkeypatch):
    """Where nobody listens the first picture takes as long as it may; for the second that is known."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    reader = Reader(None, StorageOptions(), patience=1)
    for most in (10, 0.5):
        began = time.monotonic()
        with pytest.raises(Unreadable, match="no answer within 1 seconds"):
            reader.read("s3://pictures/7.png")
        assert time.monotonic() - began < most
