"""LoRAs fetched over the wire, from real servers, into a cache that several processes share."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from werkzeug import Response

from tests.clock import Clock
from tests.servers.s3 import client
from text2img.concurrency.signals import Stop
from text2img.engine.loras import LoraCache, SourceAllowlist
from text2img.engine.loras.cache import Cache
from text2img.engine.loras.sources import check_header
from text2img.errors import ErrorCode, PromptFailed, Stopped
from text2img.prompts.parameters import Lora


def weights(size=16, fill=b"\x00"):
    """A whole safetensors file of so many bytes of weights."""
    header = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + fill * size


def library(folder, sources, *, size=10**9, retry_timeout=5, wait=None):
    wait = wait or Clock().sleep
    return LoraCache(
        SourceAllowlist.parse(sources), Cache(folder / "cache", size, wait), wait, retry_timeout=retry_timeout
    )


def lora(path, **told):
    return Lora(path=path, weight=1.0, **told)


def refusal(shelf, path, code=ErrorCode.LORA_FAILED, **told):
    with pytest.raises(PromptFailed) as caught:
        shelf.file(lora(path, **told))
    assert caught.value.code is code
    return str(caught.value)


@pytest.fixture
def web(httpserver):
    """A server that keeps ETags, and counts what it sends."""

    class Web:
        content = weights()
        url = httpserver.url_for("/loras/")

        def answer(self, request):
            etag = f'"{hashlib.sha256(self.content).hexdigest()}"'
            same = request.headers.get("If-None-Match") == etag
            self.sent.append(304 if same else 200)
            return Response(b"" if same else self.content, 304 if same else 200, {"ETag": etag})

    served = Web()
    served.sent = []
    httpserver.expect_request("/loras/style.safetensors").respond_with_handler(served.answer)
    return served


def test_a_file_is_fetched_once_and_looked_at_again(web, tmp_path):
    """What is in the cache is asked about, and fetched again only when it has changed; a hash that was told
    and is right needs no question.
    """
    path = web.url + "style.safetensors"
    file = library(tmp_path, web.url).file(lora(path))
    assert Path(file).read_bytes() == web.content
    shelf = library(tmp_path, web.url)
    assert {shelf.file(lora(path)), shelf.file(lora(path))} == {file}
    assert web.sent == [200, 304]
    web.content, before = weights(fill=b"\x01"), web.content
    changed = library(tmp_path, web.url).file(lora(path))
    assert changed != file
    assert web.sent == [200, 304, 200]
    told = hashlib.sha256(web.content).hexdigest()
    assert library(tmp_path, web.url).file(lora(path, sha256=told, size=len(before))) == changed
    assert web.sent == [200, 304, 200]


def test_what_was_told_must_be_so(web, tmp_path):
    """Another size or hash than the prompt's is refused, from the server and from the cache alike."""
    shelf, path = library(tmp_path, web.url), web.url + "style.safetensors"
    for _ in range(2):
        assert "bytes instead of 5" in refusal(shelf, path, size=5)
        assert "its SHA-256 is not the requested one" in refusal(shelf, path, sha256="0" * 64)
        shelf.file(lora(path))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (Response(b"gone", 404), "its server answers 404"),
        (Response(b"", 403), "its server answers 403"),
        (
            Response(b"", 302, {"Location": "http://169.254.169.254/"}),
            "redirects, and redirects are not followed",
        ),
        (Response(b"<html>sorry</html>", 200), "a web page"),
        (Response(b"\x80\x02pickle pickle", 200), "a pickle"),
        (Response(weights()[:-3], 200), "it is corrupt"),
        (Response(weights(2000), 200), "more than 1,000 bytes"),
        (Response(b"", 200), "too short"),
    ],
)
def test_what_will_not_go_better_fails(httpserver, tmp_path, answer, says):
    """An answer that stays is the prompt's failure, at once, and leaves nothing in the cache."""
    httpserver.expect_request("/a").respond_with_response(answer)
    shelf = library(tmp_path, httpserver.url_for("/"), size=1000)
    assert says in refusal(shelf, httpserver.url_for("/a"))
    assert len(httpserver.log) == 1
    assert not [file for file in (tmp_path / "cache").iterdir() if file.suffix != ".lock"]


def test_what_may_go_better_is_tried_again(httpserver, tmp_path):
    """503, 429 and a broken answer are asked again; where that does not help, the prompt is tried later."""
    for status in (503, 429):
        httpserver.expect_ordered_request("/a").respond_with_data("busy", status)
    httpserver.expect_ordered_request("/a").respond_with_data(weights())
    clock = Clock()
    shelf = library(tmp_path, httpserver.url_for("/"), retry_timeout=20, wait=clock.sleep)
    assert shelf.file(lora(httpserver.url_for("/a")))
    assert [pause for pause in clock.pauses if pause] == [0.5, 1.0]
    nobody = library(tmp_path, "http://127.0.0.1:1/", retry_timeout=0)
    said = refusal(nobody, "http://127.0.0.1:1/a", ErrorCode.GENERATION_FAILED)
    assert said.startswith("the LoRA cannot be fetched for the moment: its server cannot be reached")


def test_a_stop_ends_a_fetch(httpserver, tmp_path):
    """Asked to end while a LoRA's server is busy, a run waits no longer for it."""
    stop = Stop()

    def busy(_):
        stop.set(15)
        return Response(b"", 503)

    httpserver.expect_request("/a").respond_with_handler(busy)
    with pytest.raises(Stopped):
        library(tmp_path, httpserver.url_for("/"), wait=stop.wait, retry_timeout=60).file(
            lora(httpserver.url_for("/a"))
        )


def test_objects_of_cloud_storage(gcs, tmp_path):
    """A LoRA in a bucket is fetched once, again once it has changed, and refused where missing."""
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    bucket = storage.Client("x", AnonymousCredentials()).bucket(gcs.bucket)
    _check_bucket(f"gs://{gcs.bucket}", tmp_path, lambda key, data: bucket.blob(key).upload_from_string(data))


def test_objects_of_s3(s3, tmp_path):
    """The same of S3, by ETag."""
    put = client(s3).put_object
    _check_bucket(f"s3://{s3.bucket}", tmp_path, lambda key, data: put(Bucket=s3.bucket, Key=key, Body=data))


def _check_bucket(url, tmp_path, put):
    path = f"{url}/loras/style.safetensors"
    put("loras/style.safetensors", large := weights(9 * 2**20))
    file = library(tmp_path, f"{url}/loras/").file(lora(path))
    assert Path(file).read_bytes() == large
    assert library(tmp_path, f"{url}/loras/").file(lora(path)) == file
    put("loras/style.safetensors", weights(fill=b"\x01"))
    assert library(tmp_path, f"{url}/loras/").file(lora(path)) != file
    assert "it is not in its bucket" in refusal(library(tmp_path, url), f"{url}/none.safetensors")
    assert "more than 100,000 bytes" in refusal(library(tmp_path / "b", url, size=10**5), _big(url, put))


def _big(url, put):
    put("big.safetensors", weights(2 * 10**5))
    return f"{url}/big.safetensors"


def test_local_files_are_not_copied(tmp_path):
    """A file of this machine is used where it is, checked as those that are fetched."""
    file = tmp_path / "style.safetensors"
    file.write_bytes(weights())
    shelf = library(tmp_path, str(tmp_path))
    told = hashlib.sha256(weights()).hexdigest()
    assert shelf.file(lora(str(file), sha256=told, size=len(weights()))) == str(file)
    assert "its SHA-256 is not" in refusal(shelf, str(file), sha256="0" * 64)
    assert "there is no such file" in refusal(shelf, str(tmp_path / "none.safetensors"))
    (tmp_path / "folder.safetensors").mkdir()
    assert "cannot be read" in refusal(shelf, str(tmp_path / "folder.safetensors"))
    assert not (tmp_path / "cache").exists()


def test_a_server_that_sees_many_loras_forgets_the_oldest(tmp_path):
    """However many LoRAs are asked for over the days, only the latest thousand are remembered."""
    file = tmp_path / "style.safetensors"
    file.write_bytes(weights())
    shelf = library(tmp_path, str(tmp_path))
    for number in range(1_050):
        shelf.file(Lora(path=str(file), weight=number / 1_000))
    gc.collect()
    remembered = [each for each in gc.get_objects() if type(each) is Lora and each.path == str(file)]
    assert len(remembered) <= 1_000


def test_the_least_recently_used_go_first(httpserver, tmp_path):
    """Beyond its size the cache loses what was used longest ago, but nothing that a run is using."""
    one = len(weights(1000))
    for name in "abcd":
        httpserver.expect_request(f"/{name}").respond_with_data(
            weights(1000, name.encode()), headers={"ETag": name}
        )
    url = httpserver.url_for("/")
    first = library(tmp_path, url, size=3 * one).file(lora(url + "a"))
    for name, age in (("b", 300), ("c", 200)):
        file = library(tmp_path, url, size=3 * one).file(lora(url + name))
        _age(tmp_path, file, age)
    _age(tmp_path, first, 100)
    kept = library(tmp_path, url, size=3 * one)
    held = kept.file(lora(url + "b"))  # looked at, and held
    _age(tmp_path, held, 300)
    library(tmp_path, url, size=3 * one).file(lora(url + "d"))
    left = {file.read_bytes()[-1:] for file in (tmp_path / "cache").glob("*.safetensors")}
    assert left == {b"a", b"b", b"d"}
    assert kept.file(lora(url + "b")) == held


def test_a_users_files_in_the_folder_are_not_the_caches(httpserver, tmp_path):
    """However small the cache and however old they are: LoRAs, notes and parts of other names stay."""
    folder = tmp_path / "cache"
    folder.mkdir()
    mine = [folder / name for name in ("mine.safetensors", "mine.json", "part-one.txt", "part-2")]
    for path in mine:
        path.write_bytes(weights(1000))
        os.utime(path, (0, 0))
    httpserver.expect_request("/a").respond_with_data(weights(1000, b"a"), headers={"ETag": "a"})
    url = httpserver.url_for("/")
    assert Path(library(tmp_path, url, size=len(weights(1000))).file(lora(url + "a"))).exists()
    assert all(path.exists() for path in mine)


def _age(folder, file, seconds):
    """As if the file had been used so long ago."""
    (note,) = (n for n in (folder / "cache").glob("*.json") if json.loads(n.read_text())["file"] in file)
    then = note.stat().st_mtime - seconds
    os.utime(note, (then, then))


PROCESS = """
import sys, time
from pathlib import Path
from text2img.engine.loras import LoraCache, SourceAllowlist
from text2img.engine.loras.cache import Cache
from text2img.prompts.parameters import Lora
folder, url = sys.argv[1:]
library = LoraCache(SourceAllowlist.parse(url), Cache(Path(folder), 10**9, time.sleep), time.sleep)
print(flush=True)  # ready
sys.stdin.readline()
print(library.file(Lora(url + "a", 1.0)))
"""


def test_processes_share_one_download(httpserver, tmp_path):
    """Of four processes that want the same LoRA one fetches it; the others ask and find it unchanged."""
    sent = []

    def answer(request):
        sent.append(304 if request.headers.get("If-None-Match") else 200)
        return Response(weights(10**6), sent[-1], {"ETag": '"a"'})

    httpserver.expect_request("/a").respond_with_handler(answer)
    command = [sys.executable, "-c", PROCESS, str(tmp_path), httpserver.url_for("/")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for worker in workers:
        worker.stdout.readline()
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    files = {worker.communicate()[0] for worker in workers}
    assert (len(files), sorted(sent)) == (1, [200, 304, 304, 304])


def test_a_note_that_lies_is_not_believed(web, tmp_path):
    """Where a file in the cache has gone or has another size than was noted, it is fetched again."""
    path = web.url + "style.safetensors"
    file = library(tmp_path, web.url).file(lora(path))
    os.truncate(file, 10)
    again = library(tmp_path, web.url).file(lora(path))
    assert Path(again).read_bytes() == web.content
    (note,) = (tmp_path / "cache").glob("*.json")
    note.write_text("{")
    assert library(tmp_path, web.url).file(lora(path)) == again
    assert web.sent == [200, 200, 200]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"12345678",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"nope",
        weights() + b"x",
        weights()[:-1],
        weights().replace(b"[0,", b"[9,"),
        weights().replace(b"data_offsets", b"data_offsetz"),
        struct.pack("<Q", 20_000) + b"[" * 20_000,
    ],
)
def test_what_is_no_safetensors_is_found_by_its_header(tmp_path, content):
    """Lengths beyond the file, other JSON, tensors that overlap, leave a gap or lie outside."""
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"it is|it contains|its header"):
        check_header(file)
    file.write_bytes(weights())
    check_header(file)
