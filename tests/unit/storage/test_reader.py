"""Pictures read back from wherever their URLs say, and from nowhere that they must not."""

from __future__ import annotations

import threading

import pytest

from tests.servers import free_port
from tests.servers.scripted import ScriptedGcs, ScriptedS3
from text2img.errors import ObjectUnreadable, StorageFailed
from text2img.storage import ImageReader, StorageOptions, open_storage


class Deaf:
    """A storage where nobody answers; it counts who asks."""

    def __init__(self):
        self.asked = 0

    def read(self, url):
        self.asked += 1
        raise StorageFailed("nobody answers")


class Hanging(Deaf):
    """A storage that gives no answer before it is released."""

    def __init__(self):
        super().__init__()
        self.released = threading.Event()

    def read(self, url):
        self.asked += 1
        self.released.wait()
        return b"too late"


@pytest.fixture
def folder(tmp_path):
    """A folder of pictures, and one beside it."""
    for name in ("pictures", "others"):
        open_storage(str(tmp_path / name)).put("7.png", name.encode(), "image/png", lambda: False)
    return tmp_path


def test_files_are_read_where_their_paths_say(folder):
    """Of any folder where no output is named, of that one alone where it is."""
    anywhere = ImageReader(None, StorageOptions())
    in_folder = ImageReader(open_storage(str(folder / "pictures")), StorageOptions())
    for name in ("pictures", "others"):
        assert anywhere.read(f"{folder}/{name}/7.png") == name.encode()
    assert in_folder.read(f"{folder}/pictures/7.png") == b"pictures"
    with pytest.raises(ObjectUnreadable, match="set --output to its location"):
        in_folder.read(f"{folder}/others/7.png")


@pytest.mark.parametrize(
    "url",
    ["/etc/hostname", "/etc/passwd\0.png", "7.png", "", "javascript:alert(1)", "https://example.com/7.png",
     "file:///etc/passwd.png", "ftp://h/7.png", "gs://Not A Bucket/7.png", "gs:///7.png", "s3://..//7.png"],
)  # fmt: skip
def test_nothing_else_is_touched(url):
    """What is no picture's path and no bucket's URL is refused before any file or network is touched."""
    with pytest.raises(ObjectUnreadable):
        ImageReader(None, StorageOptions()).read(url)


@pytest.mark.parametrize(
    ("scripted", "url", "path"),
    [
        (ScriptedGcs, "gs://bkt/reading/a 7.png", "/o/reading%2Fa%207.png"),
        (ScriptedGcs, "https://storage.googleapis.com/bkt/reading/a%207.png", "/o/reading%2Fa%207.png"),
        (ScriptedS3, "s3://bkt/reading/a 7.png", "/bkt/reading/a%207.png"),
    ],
)
def test_buckets_are_read_where_the_urls_say(httpserver, monkeypatch, scripted, url, path):
    """By the bucket's own scheme, and on Cloud Storage by its public URL as well."""
    server = scripted(httpserver)
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    server.answers(server.content(b"picture"), server.gone())
    reader = ImageReader(None, StorageOptions())
    assert reader.read(url) == b"picture"
    assert server.requests[0].environ["RAW_URI"].partition("?")[0].endswith(path)
    with pytest.raises(ObjectUnreadable, match="does not exist"):
        reader.read(url.replace("7.png", "8.png"))


def test_a_place_that_does_not_answer_is_asked_once():
    """Every further picture of it has the same reason at once."""
    deaf = Deaf()
    reader = ImageReader(deaf, StorageOptions())
    for _ in range(3):
        with pytest.raises(ObjectUnreadable, match="nobody answers"):
            reader.read("gs://b/7.png")
    assert deaf.asked == 1


def test_a_silent_place_takes_its_timeout_once():
    """Where no answer comes the first picture waits as long as it may; for the second that is known."""
    silent = Hanging()
    reader = ImageReader(silent, StorageOptions(), timeout=0.05)
    for _ in range(2):
        with pytest.raises(ObjectUnreadable, match=r"no answer within 0\.05 seconds"):
            reader.read("gs://b/7.png")
    silent.released.set()
    assert silent.asked == 1


def test_a_server_that_is_not_there_takes_its_timeout(monkeypatch):
    """A bucket's own retries are longer than the reader's timeout, which ends them."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    reader = ImageReader(None, StorageOptions(), timeout=0.05)
    for _ in range(2):
        with pytest.raises(ObjectUnreadable, match=r"no answer within 0\.05 seconds"):
            reader.read("s3://pictures/7.png")
