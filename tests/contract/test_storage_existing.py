"""What becomes of an object that is there already, in every storage: left alone, replaced, or not touched."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from tests.servers.s3 import client
from text2img.errors import ClaimLost, ErrorCode, PromptFailed
from text2img.storage import MAX_OBJECT_BYTES, Existing, open_storage

OLD, NEW = b"the image that is there", b"a new image"


class Place:
    """A storage of one kind, and a way past it."""

    def __init__(self, url, write, read):
        self.storage, self.write, self.read = open_storage(url), write, read

    def put(self, existing, may_replace=lambda: True, name="7.png", data=NEW):
        """Store NEW under the name of OLD; ``existing`` is what OLD is taken for."""
        return self.storage.put(
            name, data, "image/png", may_replace, existing if callable(existing) else lambda _: existing
        )


@pytest.fixture(params=["folder", "gcs", "s3"])
def place(request, tmp_path):
    """A storage of each kind with OLD in it."""
    if request.param == "folder":
        path = tmp_path / "7.png"
        made = Place(str(tmp_path), path.write_bytes, path.read_bytes)
    else:
        made = _bucket(request.param, request.getfixturevalue(request.param), tmp_path.name)
    made.write(OLD)
    return made


def _bucket(kind, server, prefix):
    path = f"{prefix}/7.png"
    if kind == "s3":
        bucket, at = client(server), {"Bucket": server.bucket, "Key": path}

        def read():
            return bucket.get_object(**at)["Body"].read()

        return Place(f"s3://{server.bucket}/{prefix}", lambda data: bucket.put_object(**at, Body=data), read)
    from google.cloud import storage

    blob = storage.Client().bucket(server.bucket).blob(path)
    return Place(f"gs://{server.bucket}/{prefix}", blob.upload_from_string, blob.download_as_bytes)


def test_it_is_shown_as_it_is(place):
    """The whole content is what the decision is made from, also of an empty object."""
    shown = []
    for content in (OLD, b"", os.urandom(3 << 20)):
        place.write(content)
        place.put(lambda existing: shown.append(existing) or Existing.SAME)
        assert shown[-1] == content
        assert place.read() == content


def test_the_same_image_is_left_alone(place):
    """Its URL is returned and nothing is uploaded, whether or not the claim still holds."""
    assert place.put(Existing.SAME) == place.put(Existing.SAME, lambda: False)
    assert place.read() == OLD


def test_the_prompts_own_is_replaced_under_the_claim(place):
    """An image that was recorded for the prompt gives way to its claim's holder, and to no other."""
    with pytest.raises(ClaimLost):
        place.put(Existing.OURS, lambda: False)
    assert place.read() == OLD
    place.put(Existing.OURS)
    assert place.read() == NEW


def test_a_foreign_one_is_never_replaced(place):
    """It fails the one prompt, with the reason, though the claim holds."""
    with pytest.raises(PromptFailed, match=r"not one that this database recorded.*--output") as caught:
        place.put(Existing.FOREIGN)
    assert caught.value.code is ErrorCode.STORAGE_REJECTED
    assert place.read() == OLD


def test_who_lost_the_claim_is_no_judge_of_it(place):
    """Another worker may have stored it meanwhile: the claim is lost, the prompt has not failed."""
    with pytest.raises(ClaimLost):
        place.put(Existing.FOREIGN, lambda: False)
    assert place.read() == OLD


def test_of_many_databases_at_once_one_has_the_name(place):
    """Sixteen writers, each with an image and a claim of its own: one is stored, and fifteen prompts fail."""
    start = threading.Barrier(16)

    def write(number):
        data = b"%02d" % number
        start.wait()
        try:
            place.put(Existing.FOREIGN, name="8.png", data=data)
        except PromptFailed:
            return None
        return data

    with ThreadPoolExecutor(16) as pool:
        (won,) = filter(None, pool.map(write, range(16)))
    shown = []
    with suppress(PromptFailed):
        place.put(lambda existing: shown.append(existing) or Existing.FOREIGN, name="8.png", data=b"late")
    assert shown[0] == won


@pytest.mark.parametrize("place", ["gcs", "s3"], indirect=True)
def test_an_object_that_changes_after_the_look_stays(place):
    """It is replaced only while it is what was looked at; what came then is looked at as well."""

    def look(existing):
        if existing == b"foreign":
            return Existing.FOREIGN
        place.write(b"foreign")
        return Existing.OURS

    with pytest.raises(PromptFailed):
        place.put(look)
    assert place.read() == b"foreign"


def test_a_larger_object_than_any_image_is_foreign(tmp_path):
    """It is not compared, and not replaced, though everything would be taken for our own."""
    path = tmp_path / "7.png"
    path.touch()
    os.truncate(path, MAX_OBJECT_BYTES + 1)
    with pytest.raises(PromptFailed):
        Place(str(tmp_path), None, None).put(lambda _: Existing.OURS)
    assert path.stat().st_size == MAX_OBJECT_BYTES + 1


def test_a_link_that_leads_nowhere_is_not_ours(tmp_path):
    """A symbolic link without a file is another program's file, and stays."""
    path = tmp_path / "7.png"
    path.symlink_to("annexed")
    with pytest.raises(PromptFailed):
        Place(str(tmp_path), None, None).put(lambda existing: Existing.OURS if existing else Existing.FOREIGN)
    assert path.is_symlink()
