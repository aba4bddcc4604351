"""What every ImageStorage promises, asked of each implementation."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from tests.servers.s3 import client
from text2img.errors import ClaimLost, ConfigurationError, ObjectUnreadable, StorageFailed
from text2img.prompts import PromptId
from text2img.storage import StorageOptions, open_storage

NASTY = [
    PromptId("int", "7"),
    PromptId("str", "7"),
    PromptId("objectid", "5f43a2b1c0ffee0123456789"),
    PromptId("str", "../../etc/passwd"),
    PromptId("str", "a/b\\c?d#e%2Ff*[g]"),
    PromptId("str", ".hidden"),
    PromptId("str", ""),
    PromptId("str", "日の出 🌅 \u0000\n\ud800"),
    PromptId("str", "x" * 5000),
    PromptId("binary", '{"$binary": {"base64": "AAE=", "subType": "00"}}'),
]


class Place:
    """A storage and a way to see what is really in it, past the adapter."""

    def __init__(self, url, read):
        self.url, self.read = url, read
        self.storage = open_storage(url)

    def put(self, name, data, may_replace=lambda: False, content_type="image/png"):
        return self.storage.put(name, data, content_type, may_replace)


@pytest.fixture(params=["folder", "gcs", "s3"])
def place(request, tmp_path):
    if request.param == "folder":
        folder = tmp_path / "made" / "when needed"
        return Place(str(folder), lambda: _files(folder))
    server = request.getfixturevalue(request.param)
    scheme, objects = {"gcs": ("gs", _gcs_objects), "s3": ("s3", _s3_objects)}[request.param]
    return Place(
        f"{scheme}://{server.bucket}/{tmp_path.name}/generated", lambda: objects(server, tmp_path.name)
    )


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _s3_objects(server, prefix):
    bucket = client(server)
    found = bucket.list_objects_v2(Bucket=server.bucket, Prefix=f"{prefix}/").get("Contents", [])
    read = {each["Key"]: bucket.get_object(Bucket=server.bucket, Key=each["Key"]) for each in found}
    return {key.removeprefix(f"{prefix}/generated/"): each["Body"].read() for key, each in read.items()}


def _gcs_objects(server, prefix):
    from google.cloud import storage

    bucket = storage.Client().bucket(server.bucket)
    return {
        blob.name.removeprefix(f"{prefix}/generated/"): blob.download_as_bytes()
        for blob in bucket.list_blobs(prefix=f"{prefix}/")
    }


def test_stored_object_is_there_under_its_url(place):
    """What was put can be read back whole, and the URL says where it is."""
    url = place.put("7.png", b"picture" * 1000)
    assert place.read() == {"7.png": b"picture" * 1000}
    expected = place.url if "://" in place.url else str(Path(place.url).absolute())
    assert url == f"{expected}/7.png"


def test_a_name_may_lie_deeper(place):
    """A slash in a name, which a template brings, is a folder of that name; once stored it is left alone."""
    urls = {place.put("renders/gen_7.png", b"picture") for _ in range(2)}
    assert [url.endswith("/renders/gen_7.png") for url in urls] == [True]
    assert place.read() == {"renders/gen_7.png": b"picture"}


def test_public_pictures_say_where_anybody_finds_them(place):
    """A bucket takes ``--acl public-read`` and says an https-like URL; a folder refuses what it cannot do."""
    public = StorageOptions(acl="public-read", public_urls=True)
    if "://" not in place.url:
        with pytest.raises(ConfigurationError, match="--acl and --public-urls"):
            open_storage(place.url, public)
        return
    url = open_storage(place.url, public).put("7.png", b"picture", "image/png", lambda: False)
    assert url.startswith("http")
    assert url.endswith(place.url.partition("://")[2] + "/7.png")
    assert place.read() == {"7.png": b"picture"}


def test_empty_and_large_objects_pass(place):
    """Nothing at all and more than one upload's part (8 MiB at Cloud Storage) arrive as they are."""
    large = os.urandom(1 << 20) * 9
    place.put("empty.png", b"")
    place.put("large.png", large)
    assert place.read() == {"empty.png": b"", "large.png": large}


def test_no_id_leaves_the_prefix_or_meets_another(place):
    """Names made from nasty ids are stored side by side, each with its own content."""
    for number, identity in enumerate(NASTY):
        place.put(f"{identity.name}.png", bytes([number]))
    assert place.read() == {f"{each.name}.png": bytes([number]) for number, each in enumerate(NASTY)}


def test_same_content_is_left_alone(place):
    """Putting the same again returns the same URL and never asks whether it may replace."""
    asked = []
    urls = {place.put("7.png", b"same", lambda: asked.append(1) or True) for _ in range(3)}
    assert len(urls) == 1
    assert not asked
    assert place.read() == {"7.png": b"same"}


def test_other_content_is_replaced_by_who_holds_the_claim(place):
    """A different object gives way to a worker that still holds its claim, and it is asked just once."""
    asked = []
    place.put("7.png", b"old one")
    place.put("7.png", b"new one", lambda: asked.append(1) or True)
    assert place.read() == {"7.png": b"new one"}
    assert len(asked) == 1


def test_other_content_stays_when_the_claim_is_lost(place):
    """A worker whose claim is lost gets ClaimLost and changes nothing."""
    place.put("7.png", b"the other's")
    with pytest.raises(ClaimLost):
        place.put("7.png", b"too late", lambda: False)
    assert place.read() == {"7.png": b"the other's"}


def test_of_many_writers_at_once_one_wins(place):
    """Sixteen threads with different content and no claim: one object, its writer told so, the rest lost."""
    start = threading.Barrier(16)

    def write(number):
        start.wait()
        try:
            place.put("7.png", b"%02d" % number)
        except ClaimLost:
            return None
        return b"%02d" % number

    with ThreadPoolExecutor(16) as pool:
        won = [content for content in pool.map(write, range(16)) if content]
    assert len(won) == 1
    assert place.read() == {"7.png": won[0]}


def test_many_threads_store_many_objects(place):
    """One storage serves 24 threads at once without a warning or a loss."""
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(lambda number: place.put(f"{number}.png", b"%d" % number), range(48)))
    assert place.read() == {f"{number}.png": b"%d" % number for number in range(48)}


def test_check_passes_and_changes_nothing(place):
    """A storage that could be written to passes, and nothing is there afterwards that was not before."""
    place.storage.check()
    place.storage.check()
    assert place.read() == {}


def test_try_write_leaves_nothing(place):
    """The object that doctor stores is gone again, and pictures are untouched."""
    place.put("7.png", b"picture")
    place.storage.check_writable()
    assert place.read() == {"7.png": b"picture"}


@pytest.mark.parametrize("public", [False, True], ids=["own", "public"])
def test_what_was_stored_is_read_by_its_url(place, public):
    """The URL that put returned, of whatever form and for a name of any id, gives the same bytes back."""
    if public and "://" not in place.url:
        pytest.skip("a folder has no public URLs")
    storage = open_storage(place.url, StorageOptions(public_urls=public))
    contents = {f"deep/{each.name}.png": os.urandom(1000) for each in NASTY} | {"empty.png": b""}
    urls = {name: storage.put(name, data, "image/png", lambda: False) for name, data in contents.items()}
    assert {name: place.storage.read(url) for name, url in urls.items()} == contents


def test_nothing_is_read_from_elsewhere(place):
    """A URL beside the place, above it, of another kind, or of no object at all is told so, and so is one
    whose object is not there; nothing of it is asked of any network or disk but the last.
    """
    url = place.put("7.png", b"picture")
    above, name = url.rsplit("/generated/", 1) if "/generated/" in url else url.rsplit("/", 1)
    elsewhere = [
        *(f"{above}/other.png", f"{above}-2/{name}", f"{url.removesuffix(name)}../other.png"),
        *(url.removesuffix(name), f"{url}/", f"{url}\0", f"{url.removesuffix(name)}\ud800.png", ""),
        *("/etc/hostname", "file:///etc/hostname", "javascript:alert(1)", "https://example.com/7.png"),
    ]
    for each in elsewhere:
        with pytest.raises(ObjectUnreadable, match=r"is not in|cannot be read"):
            place.storage.read(each)
    with pytest.raises(ObjectUnreadable, match=r"cannot be read: (it does not exist|No such file)"):
        place.storage.read(url.replace("7.png", "8.png"))


@pytest.mark.parametrize(
    "name", ["", "/b.png", "a//b.png", "a/../b.png", "../x.png", "a/.x.png", ".x.png", "x\0.png"]
)
def test_impossible_names_are_bugs(place, name):
    """A name that no ObjectName makes is refused before anything is touched."""
    with pytest.raises(ValueError, match="not a valid object name"):
        place.put(name, b"x")
    assert place.read() == {}


def test_killed_writer_leaves_whole_objects_only(place):
    """A process killed in the middle of its writes leaves objects that are whole or absent."""
    program = textwrap.dedent("""
        import sys
        from text2img.storage import open_storage
        storage, number = open_storage(sys.argv[1]), 0
        while True:
            storage.put(f"{number}.png", bytes([number % 256]) * 300_000, "image/png", lambda: False)
            print(number, flush=True)
            number += 1
    """)
    writer = subprocess.Popen([sys.executable, "-c", program, place.url], stdout=subprocess.PIPE)
    with writer.stdout:
        stored = [int(writer.stdout.readline()) for _ in range(5)][-1]
        writer.kill()
        writer.wait()
    found = {name: data for name, data in place.read().items() if not name.startswith(".")}
    assert {f"{number}.png" for number in range(stored + 1)} <= found.keys()
    assert all(data == bytes([int(name[:-4]) % 256]) * 300_000 for name, data in found.items())


# What moto alone can show


@pytest.mark.parametrize(("acl", "passes"), [("public-read", False), ("bucket-owner-full-control", True)])
def test_check_finds_a_bucket_without_acls(s3, acl, passes):
    """Object ownership that rules ACLs out is found before anything is made, where the account may ask."""
    bucket = client(s3)
    name = f"enforced-{acl}"
    bucket.create_bucket(Bucket=name, ObjectOwnership="BucketOwnerEnforced")
    place = open_storage(f"s3://{name}", StorageOptions(acl=acl))
    if passes:
        place.check()
    else:
        with pytest.raises(StorageFailed, match="allows no ACLs"):
            place.check()


def test_public_url_is_one_that_anybody_can_read(s3):
    """Elsewhere: endpoint, bucket, name; odd prefixes percent-encoded, so that a GET finds it."""
    place = open_storage(
        f"s3://{s3.bucket}/日 の+%25/a&b=c~d", StorageOptions(acl="public-read", public_urls=True)
    )
    url = place.put("7~str.png", b"picture", "image/png", lambda: False)
    assert url == (f"{s3.endpoint}/{s3.bucket}/%E6%97%A5%20%E3%81%AE%2B%2525/a%26b%3Dc~d/7~str.png")
    answer = requests.get(url, timeout=60)
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (
        200,
        b"picture",
        "image/png",
    )
