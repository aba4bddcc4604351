"""Models in buckets, through real servers: fetched once and whole, checked, and what is hostile refused."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import shutil
import zlib

import pytest

from tests.clock import Clock
from tests.servers import free_port
from tests.servers.models import MODEL, depot
from tests.servers.s3 import client
from text2img.engine import EngineOptions
from text2img.engine.models import ModelCache
from text2img.errors import ConfigurationError, ModelFailed, Stopped
from text2img.storage.s3_bucket import full_checksum, multipart_checksum

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo model's files, but with few weights: nothing here reads them, and a server takes seconds to
    take in megabytes.
    """
    folder = shutil.copytree(MODEL, tmp_path_factory.mktemp("model") / "small")
    for file in folder.rglob("*.safetensors"):
        os.truncate(file, 1_000)
    return folder


@pytest.fixture(params=["gs", "s3"])
def there(request, monkeypatch, model):
    """The model in a bucket of its own kind, where this process finds it."""
    server = request.getfixturevalue({"gs": "gcs_server", "s3": "s3_server"}[request.param])
    with depot(request.param, server, model) as found:
        for name, value in found.variables.items():
            monkeypatch.setenv(name, value)
        yield found


@pytest.fixture
def s3_depot(s3, monkeypatch, model):
    """The same on S3, whose server takes every name."""
    with depot("s3", s3, model) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.tap.url)
        yield found


def find(folder, url, clock=None, **options):
    """Where a shelf of its own has the model; it waits by the clock."""
    clock = clock or Clock()
    shelf = ModelCache(lambda: folder / "cache", clock.sleep, clock=clock.monotonic)
    return shelf.find(EngineOptions(model=url, **options))


def copies(folder):
    """What the cache has of the one model that was asked for, but for its lock."""
    return sorted(each.name for each in folder.glob("cache/*/*") if each.is_dir())


def test_fetched_once_and_whole(there, model, tmp_path):
    """The copy is the model, byte by byte, without the pickles and marks of folders beside it; the same again
    reads only the index, and its revision is that of the same files elsewhere.
    """
    for name in ("unet/diffusion_pytorch_model.bin", "model.ckpt", "README.md"):
        there.put(name, b"no")
    if there.kind == "s3":  # the other emulator takes no such name
        there.put("unet/", b"")
    path, revision = find(tmp_path, there.url)
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert found == {str(f.relative_to(model)): f.read_bytes() for f in model.rglob("*") if f.is_file()}
    assert path.name == revision
    del there.tap.read[:]
    assert find(tmp_path, f"{there.url}/") == (path, revision)
    assert [name.rpartition("/")[2] for name in there.tap.read] == ["model_index.json"]


def test_one_file(there, tmp_path):
    """One object is a model too: it alone is read, found again, and named where it is not there. A base
    leaves out the weights that it need not lend.
    """
    there.put("one.safetensors", b"weights")
    there.put("one.safetensors.old", b"no")
    url = f"{there.url}/one.safetensors"
    path, revision = find(tmp_path, url)
    assert path.read_bytes() == b"weights"
    assert (path.name, path.parent.name) == ("one.safetensors", revision)
    assert {name.rpartition("/")[2] for name in there.tap.read} == {"one.safetensors"}
    del there.tap.read[:]
    assert find(tmp_path, url) == (path, revision)
    assert there.tap.read == []
    with pytest.raises(ConfigurationError, match=r"there is nothing at .*/two\.safetensors"):
        find(tmp_path, f"{there.url}/two.safetensors")
    base, _ = find(tmp_path, there.url, without=("unet",))
    assert (base / "unet" / "config.json").is_file()
    assert not (base / WEIGHTS).exists()
    assert (base / "vae" / "diffusion_pytorch_model.safetensors").is_file()


def test_a_changed_bucket_makes_a_new_copy(there, model, tmp_path):
    """Another configuration of the same length: a new copy, and the old one goes once nobody uses it."""
    using = ModelCache(lambda: tmp_path / "cache")
    old, _ = using.find(EngineOptions(model=there.url))
    config = (model / "unet" / "config.json").read_bytes()
    there.put("unet/config.json", config.replace(b"\n", b" "))
    new, _ = find(tmp_path, there.url)
    assert (new / "unet" / "config.json").read_bytes() == config.replace(b"\n", b" ")
    assert copies(tmp_path) == sorted([old.name, new.name]), "somebody uses the old one"
    for descriptor in using._snapshots[0]._descriptors:
        os.close(descriptor)  # as the end of its process does
    there.put("unet/config.json", config.replace(b"\n", b"\t"))
    newest, _ = find(tmp_path, there.url)
    assert old.name not in copies(tmp_path)
    assert newest.name in copies(tmp_path)


def test_a_bucket_that_cannot_be_reached(there, tmp_path, monkeypatch, caplog):
    """It is asked again for 20 seconds. Without a copy the model has failed then; with one that is used, and
    the log says so.
    """
    clock = Clock()
    dead = f"http://127.0.0.1:{free_port()}"
    variable = next(name for name in there.variables if name.endswith(("HOST", "URL")))
    monkeypatch.setenv(variable, dead)
    with pytest.raises(ModelFailed, match=r"cannot be read, and this machine has no copy"):
        find(tmp_path, there.url, clock)
    assert 10 < sum(clock.pauses) <= 25
    monkeypatch.setenv(variable, there.tap.url)
    fetched = find(tmp_path, there.url)
    monkeypatch.setenv(variable, dead)
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path, there.url) == fetched
    assert "using the latest copy on this machine" in caplog.text


def test_what_comes_spoiled_is_not_kept(there, tmp_path):
    """One bit turned on the way: the file is named, no copy is there, and the next try has it right."""
    there.tap.spoiled = True
    with pytest.raises(ModelFailed, match=rf"{WEIGHTS} arrived with another checksum"):
        find(tmp_path, there.url)
    assert copies(tmp_path) == []
    there.tap.spoiled = False
    path, _ = find(tmp_path, there.url)
    assert copies(tmp_path) == [path.name]


def test_a_copy_that_somebody_meddled_with_is_fetched_again(there, model, tmp_path):
    """A file that is gone, or cut, is seen by the sizes that the bucket tells."""
    path, _ = find(tmp_path, there.url)
    (path / WEIGHTS).unlink()
    (path / "vae" / "config.json").write_text("{}")
    assert find(tmp_path, there.url)[0] == path
    assert (path / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert (path / "vae" / "config.json").stat().st_size > 2


@pytest.mark.parametrize("name", ["../evil.json", "unet/../../evil.json", "/evil.json", "unet\\evil.json"])
def test_hostile_names(s3_depot, tmp_path, name):
    """A name that is no file's of the folder refuses the model, and nothing is written anywhere."""
    s3_depot.put(name, b"{}")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ModelFailed, match="is not a valid file name in a model's folder"):
        find(tmp_path, s3_depot.url)
    assert set(tmp_path.rglob("*")) == before


def test_a_hostile_index_reads_nothing_else(s3_depot, tmp_path):
    """Components that lead out of the folder are not read, nor what is no JSON; nothing is kept."""
    s3_depot.put(
        "model_index.json", b'{"_class_name": "X", "../../x": ["diffusers", "UNet2DConditionModel"]}'
    )
    with pytest.raises(ModelFailed, match="has no weights"):
        find(tmp_path, s3_depot.url)
    s3_depot.put("model_index.json", b"[")
    with pytest.raises(ModelFailed, match="cannot be read as JSON"):
        find(tmp_path, s3_depot.url)
    assert list(tmp_path.rglob("*")) == []


def test_what_is_not_there_is_a_configuration_error(there, tmp_path):
    """An empty folder, a bucket that is none, a name that is none, a revision: each has its sentence."""
    kind = there.kind
    for url, said in (
        (f"{there.url}x", "there is nothing at"),
        (f"{kind}://no-such-bucket-here/x", "there is no bucket for"),
        (f"{kind}://A_b/x", "is not a valid bucket name; write --model-id"),
        (f"{kind}://bucket/a//b", "has an empty or invalid part"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            find(tmp_path, url)
    with pytest.raises(ConfigurationError, match="has no revisions"):
        find(tmp_path, there.url, revision="main")
    assert list(tmp_path.rglob("*")) == []


def test_a_bucket_that_fails_while_it_is_read(there, tmp_path):
    """Refused in the middle: the model has failed, and nothing is kept but the lock."""
    there.tap.status = 403
    with pytest.raises(ModelFailed, match="could not be fetched: the bucket answers 403"):
        find(tmp_path, there.url)
    there.tap.status, clock = 503, Clock()
    with pytest.raises(ModelFailed, match="keeps answering 503"):
        find(tmp_path, there.url, clock)
    assert sum(clock.pauses) > 10
    there.tap.about = "model_index.json"
    there.tap.status = 412
    with pytest.raises(ModelFailed, match="it changed during the download"):
        find(tmp_path, there.url)
    there.tap.status = 403
    with pytest.raises(ConfigurationError, match="may not list and read"):
        find(tmp_path, there.url)
    assert [file.name for file in tmp_path.glob("cache/*/*")] == ["lock"]


def test_a_run_that_is_stopped_stops_fetching(there, tmp_path):
    """What ``wait`` raises ends it, though the bucket holds a file back."""
    there.tap.open.clear()

    def wait(_):
        if there.tap.reached.is_set():
            there.tap.open.set()  # or the requests that are under way would be waited for
            raise Stopped(15)

    with pytest.raises(Stopped):
        ModelCache(lambda: tmp_path, wait).find(EngineOptions(model=there.url))
    assert [file.name for file in tmp_path.glob("*/*")] == ["lock"]


def test_a_model_in_parts_is_checked_by_them(s3_depot, s3, tmp_path):
    """An object that was stored in parts has the MD5 of their MD5s: whole it passes, spoiled it does not."""
    from boto3.s3.transfer import TransferConfig

    parts, key = (
        TransferConfig(multipart_threshold=1, multipart_chunksize=5 * 2**20),
        f"{s3_depot.folder}/{WEIGHTS}",
    )
    client(s3).upload_file(str(MODEL / WEIGHTS), s3.bucket, key, Config=parts)
    s3_depot.tap.spoiled = True
    with pytest.raises(ModelFailed, match="another checksum"):
        find(tmp_path, s3_depot.url)
    s3_depot.tap.spoiled = False
    path, _ = find(tmp_path, s3_depot.url)
    assert (path / WEIGHTS).read_bytes() == (MODEL / WEIGHTS).read_bytes()


def test_which_sums_of_s3_are_used():
    """A sum of the whole before the ETag; an MD5 only where neither KMS nor a customer's key encrypts; where
    it was stored in parts only what is said to be of the whole.
    """
    data = b"text" * 1000
    md5 = hashlib.md5(data).hexdigest()  # noqa: S324 - what S3 tells
    sha256 = base64.b64encode(hashlib.sha256(data).digest()).decode()
    crc32 = base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()
    for head, etag in (({"ChecksumSHA256": sha256}, "x"), ({"ChecksumCRC32": crc32}, "x"), ({}, f'"{md5}"')):
        made, told = full_checksum(head, etag)
        for start in range(0, len(data), 7):
            made.update(data[start : start + 7])
        assert made.digest() == told
    for sealed in ({"ServerSideEncryption": "aws:kms"}, {"SSECustomerAlgorithm": "AES256"}):
        assert full_checksum(sealed, f'"{md5}"') is None
    assert full_checksum({"ChecksumCRC32": crc32}, f'"{md5}-2"') is None
    assert full_checksum({"ChecksumCRC32": crc32, "ChecksumType": "FULL_OBJECT"}, f'"{md5}-2"') is not None
    assert multipart_checksum({"ContentLength": 5, "PartsCount": 2}, f'"{md5}-2"', 11) is None
