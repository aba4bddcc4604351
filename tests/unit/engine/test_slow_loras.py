"""LoRAs whose servers are too slow: they are given up, left alone, and keep no others waiting."""

from __future__ import annotations

import gzip
from contextlib import ExitStack

import pytest

from tests.clock import Clock
from tests.servers.slow import BODY, HEADERS, slow_server
from tests.unit.engine.test_loras import library, lora, refusal, weights
from tests.waiting import until
from text2img.concurrency import http_limits
from text2img.engine import loras
from text2img.engine.loras import LoraCache, SourceAllowlist, origin_of
from text2img.engine.loras.cache import Cache, LoraPrefetcher
from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts import Claim, Prompt, PromptId, RequestedParameters, request

LATER = ErrorCode.GENERATION_FAILED


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    """Sets limits of fetches; a rate is averaged over a short time."""

    def limit(module, name, value):
        monkeypatch.setattr(module, name, value)

    limit(http_limits, "RATE_PERIOD", 0.3)
    return limit


@pytest.mark.parametrize("start", [b"", HEADERS, BODY])
def test_a_slow_server_is_given_up_and_left_alone(tmp_path, httpserver, start):
    """The prompt is tried later, its connection is closed, and only its own server is not asked again."""
    httpserver.expect_request("/a").respond_with_data(weights())
    with slow_server(start, b"H") as server:
        shelf = library(tmp_path, f"{server.url},{httpserver.url_for('/')}", retry_timeout=60)
        said = refusal(shelf, server.url + "a", LATER)
        assert "its server is too slow" in said
        until(lambda: server.closed == server.connections == 1)
        assert "is not asked again for" in refusal(shelf, server.url + "b", LATER)
        assert shelf.file(lora(httpserver.url_for("/a")))
        assert server.connections == 1
    assert not list((tmp_path / "cache").glob("part-*"))


def test_a_server_is_asked_again_after_a_while(limits, monkeypatch):
    """The time for which an origin is left alone doubles while it stays slow, for each by itself."""
    clock = [0.0]
    monkeypatch.setattr(loras.time, "monotonic", lambda: clock[0])
    origins, waits = loras.SlowOrigins(), []
    for _ in range(6):
        origins.check("https://a:443")
        origins.failed("https://a:443")
        origins.failed("https://a:443")  # another request that was under way
        with pytest.raises(loras.SourceTooSlow, match=r"for (\d+) s") as caught:
            origins.check("https://a:443")
        origins.check("https://b:443")
        waits.append(int(str(caught.value).rpartition("for ")[2].removesuffix(" s")))
        clock[0] += waits[-1]
    assert waits == [60, 120, 240, 480, 600, 600]
    origins.succeeded("https://a:443")
    origins.failed("https://a:443")
    clock[0] += 60
    origins.check("https://a:443")


def test_a_compressed_file_counts_as_what_it_unpacks_to(httpserver, tmp_path):
    """A file that unpacks to more than the cache's size is refused before it is unpacked."""
    packed = gzip.compress(bytes(10**8))
    httpserver.expect_request("/a").respond_with_data(packed, headers={"Content-Encoding": "gzip"})
    shelf = library(tmp_path, httpserver.url_for("/"), size=10**6)
    assert "more than 1,000,000 bytes" in refusal(shelf, httpserver.url_for("/a"))


def _request(number, *paths):
    prompt = Prompt(claim=Claim(PromptId("str", f"p{number}"), "w", 1), text="a")
    wanted = RequestedParameters(lora=[lora(path) for path in paths])
    model = RequestedParameters(width=64, height=64, num_inference_steps=2, guidance_scale=1.0)
    return request(prompt, (wanted, model))


def test_slow_servers_keep_nothing_else_waiting(tmp_path, httpserver, limits):
    """Local files, other servers' files and prompts without LoRAs are ready while slow ones are fetched."""
    limits(http_limits, "RATE_PERIOD", 600)
    httpserver.expect_request("/a").respond_with_data(weights())
    local = tmp_path / "style.safetensors"
    local.write_bytes(weights())
    with ExitStack() as stack:
        slow = [stack.enter_context(slow_server(BODY)) for _ in range(3)]
        sources = ",".join(
            [*(server.url for server in slow), httpserver.url_for("/"), "/nowhere", str(tmp_path)]
        )
        requests = [_request(n, f"{slow[n % 3].url}{n}") for n in range(60)]
        file, missing = str(local), "/nowhere/none.safetensors"
        quick = [[file], [missing], [httpserver.url_for("/a")], [], [file, missing]]
        requests += [_request(100 + n, *paths) for n, paths in enumerate(quick)]
        requests.append(_request(200, str(local), slow[0].url + "x"))
        with LoraPrefetcher(library(tmp_path, sources)) as fetching:
            fetching.put(requests)
            ready = fetching.take(max_pending=len(requests) - len(quick))
            assert sorted(each.prompt.id.name for each, _ in ready) == [
                "p100",
                "p101",
                "p102",
                "p103",
                "p104",
            ]
            failed = {each.prompt.id.name: failure.code for each, failure in ready if failure}
            assert failed == dict.fromkeys(["p101", "p104"], ErrorCode.LORA_FAILED)
            until(lambda: [server.connections for server in slow[1:]] == [8, 8])


def test_what_is_unexpected_fails_one_lora(tmp_path):
    """Whatever goes wrong with a fetch, the run goes on, and so do the others."""

    class Broken:
        def wait(self, seconds):
            pass

        def file(self, lora):
            if lora.path == "/a.safetensors":
                raise RecursionError
            return lora.path

    with LoraPrefetcher(Broken()) as fetching:
        fetching.put([_request(1, "/a.safetensors"), _request(2, "/b.safetensors")])
        taken = fetching.take(max_pending=0)
    ready = {each.prompt.id.name: (each.lora_files, failure) for each, failure in taken}
    assert isinstance(ready["p1"][1], PromptFailed)
    assert ready["p2"] == (("/b.safetensors",), None)


@pytest.mark.parametrize(
    ("path", "origin"),
    [
        ("/loras/a.safetensors", ""),
        ("../a", ""),
        ("artist/ink", "hub://"),
        ("gs://bucket/a", "gs://bucket"),
        ("https://Host/a", "https://host:443"),
        ("https://host:8443/a?b", "https://host:8443"),
    ],
)
def test_the_origin_of_a_path(path, origin):
    """Who is asked for the file: this machine's own files and invalid paths have no origin."""
    assert origin_of(path) == origin


@pytest.mark.parametrize("scheme", ["gs", "s3"])
@pytest.mark.parametrize("start", [HEADERS, BODY])
def test_a_slow_bucket_is_given_up(tmp_path, monkeypatch, scheme, start):
    """The clients of buckets end as well, with their sockets, and the bucket is left alone."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    with slow_server(start, b"H") as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url.rstrip("/"))
        cache = Cache(tmp_path / "cache", 10**9, Clock().sleep)
        sources = SourceAllowlist.parse(f"{scheme}://bucket/")
        shelf = LoraCache(sources, cache, Clock().sleep, s3_endpoint=server.url)
        said = refusal(shelf, f"{scheme}://bucket/a", LATER)
        assert "its bucket is too slow" in said
        assert "is not asked again for" in refusal(shelf, f"{scheme}://bucket/b", LATER)
        until(lambda: server.closed == server.connections)
