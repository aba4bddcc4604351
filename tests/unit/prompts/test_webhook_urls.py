"""Which webhook_url is understood, and which hosts may be told: hostile addresses among them."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from urllib3.util import parse_url

from text2img.errors import ConfigurationError, ErrorCode, PromptFailed
from text2img.prompts.ids import HostAllowlist, Webhook
from text2img.webhooks.client import is_public

BASE = "https://backend.example"


@pytest.mark.parametrize(
    "url",
    [
        BASE,
        f"{BASE}/",
        f"{BASE}:443",
        "HTTPS://Backend.Example./",
        f"{BASE}/api/webhooks/inference",
        f"{BASE}/api/webhooks/inference/",
        f"{BASE}/api/webhooks/inference/progress",
        f"{BASE}/api/webhooks/inference/complete",
        f"{BASE}/api/webhooks/inference/failed/",
    ],
)
def test_the_base_is_understood_with_and_without_our_part(url):
    """Every way to write one backend is the same backend, and requests go to its three places."""
    assert str(Webhook.of(url)) == BASE
    assert Webhook.of(url).to("progress") == f"{BASE}/api/webhooks/inference/progress"


def test_a_path_of_the_backends_own_stays():
    """What stands before our part of the path is kept, and a word that is none of ours as well."""
    assert Webhook.of("http://b:81/eu/api/webhooks/inference").to("failed") == (
        "http://b:81/eu/api/webhooks/inference/failed"
    )
    assert str(Webhook.of(f"{BASE}/api/webhooks/inference/else")) == f"{BASE}/api/webhooks/inference/else"


@pytest.mark.parametrize(
    "url",
    [
        None, 7, "", "backend.example", "ftp://b", "file:///etc/passwd", "http://", "http:///x", "http://:80/",
        "http://me:pw@backend.example", "http://backend.example@evil.example", "http://b?x=1", "http://b/?x",
        "http://b#x", "http://b\\@evil.example", "http://b/\\..", "http://b/ x", "http://b/\r\nHost: x",
        "http://b\t", " http://b", "http://b\n", "http://b%2eexample", "http://bücher.example", "http://[::1",
        "http://[::g]", "http://[fe80::1%25eth0]", "http://b:0", "http://b:65536", "http://b:80x", "http://a..b",
        "http://.b", "http://b/\u2028", "x" * 3000, "http://" + "b" * 3000, b"http://b", ["http://b"],
    ],
)  # fmt: skip
def test_what_is_no_plain_address_is_refused(url):
    """Users, queries, fragments, controls, other schemes, no host: invalid_parameters, with a sentence."""
    with pytest.raises(PromptFailed) as caught:
        Webhook.of(url)
    assert caught.value.code is ErrorCode.INVALID_PARAMETERS
    assert "\n" not in str(caught.value)


HOSTS = HostAllowlist.parse("backend.example, 10.0.0.5:8000, [::1], *.wild.example, two.wild.example:81,")


@pytest.mark.parametrize(
    ("url", "trusted"),
    [
        ("http://backend.example", True), ("https://BACKEND.example:8443/x", True),
        ("http://10.0.0.5:8000", True), ("http://[::1]:9", True), ("http://[0:0::1]", True),
        ("https://a.wild.example", False), ("https://a.b.wild.example", False),
        ("http://two.wild.example:81", True), ("http://two.wild.example:82", False),
    ],
)  # fmt: skip
def test_hosts_that_are_named_may_be_told(url, trusted):
    """Exactly, with a port or with any, or by a wildcard; only who is named exactly is trusted."""
    assert HOSTS.check(url)
    assert HOSTS.is_exact(Webhook.of(url)) is trusted


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example", "http://backend.example.evil.example", "http://xbackend.example",
        "http://wild.example", "http://evilwild.example", "http://10.0.0.5", "http://10.0.0.5:80",
        "http://10.0.0.6:8000", "http://10.0.0.05:8000", "http://167772165:8000", "http://0xa000005:8000",
        "http://012.0.0.5:8000", "http://10.5:8000", "http://[::ffff:10.0.0.5]:8000", "http://127.0.0.1",
        "http://localhost", "http://169.254.169.254", "http://[::]", "http://0.0.0.0", "http://2130706433",
    ],
)  # fmt: skip
def test_no_other_host_may_be_told(url):
    """Neither a look-alike nor another way to write an address; the sentence names the option."""
    with pytest.raises(PromptFailed, match="--webhook-host"):
        HOSTS.check(url)


def test_without_hosts_nobody_may_be_told():
    """Also where the option is empty."""
    for text in (None, "", " , "):
        with pytest.raises(PromptFailed, match=r"--webhook-host \(WEBHOOK_HOST\)"):
            HostAllowlist.parse(text).check(BASE)


@pytest.mark.parametrize(
    "text",
    ["https://backend.example", "*", "*.", "a*.b", "b:0", "b:99999", "b:x", "::1", "[::1", "*.[::1]", "a b",
     "a/b", "me@b", "bücher.example", "a..b", "."],
)  # fmt: skip
def test_what_is_no_host_is_a_configuration_error(text):
    """Found before anything is claimed, whatever stands beside it."""
    with pytest.raises(ConfigurationError, match="--webhook-host"):
        HostAllowlist.parse(f"good.example, {text}")


URLS = st.one_of(
    st.text(max_size=60).map(lambda text: f"http://{text}"),
    st.from_regex(r"https?://[a-z0-9.@:\[\]%\\/?#_-]{0,30}backend\.example[a-z0-9.@:\[\]%\\/?#_-]{0,30}"),
    st.lists(st.sampled_from([*"@:/\\?#[]%.", "backend.example", "evil.example", "http://", "127.1"])).map(
        "".join
    ),
)


UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@UNTIMED
@given(url=URLS)
@example(url="http://backend.example:80\\@evil.example")
@example(url="http://evil.example#@backend.example")
@example(url="http://backend.example:@evil.example")
def test_whatever_is_let_through_goes_to_an_allowed_host_for_every_parser(url):
    """Of hostile texts none passes that urllib or urllib3, which sends it, would read as another host."""
    hosts = HostAllowlist.parse("backend.example")
    try:
        address = hosts.check(url)
    except PromptFailed:
        return
    for word in ("progress", "complete", "failed"):
        sent = Webhook.of(address).to(word)
        assert urlsplit(sent).hostname == parse_url(sent).host == "backend.example"
        assert urlsplit(sent).username is None
        assert urlsplit(sent).path.endswith(f"/api/webhooks/inference/{word}")
        assert hosts.check(sent) == address


@UNTIMED
@given(st.ip_addresses(network="10.0.0.0/8") | st.ip_addresses(network="192.168.0.0/16"))
def test_private_addresses_are_known_in_every_dress(address):
    """Plain, mapped into IPv6, in 6to4, and in NAT64."""
    assert not is_public(str(address))
    assert not is_public(f"::ffff:{address}")
    assert not is_public(f"::{address}")
    assert not is_public(f"64:ff9b::{address}")
    number = int(address)
    assert not is_public(f"2002:{number >> 16:x}:{number & 0xFFFF:x}::1")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.9.9.9", "0.0.0.0", "169.254.169.254", "100.64.0.1", "224.0.0.1", "240.0.0.1",  # noqa: S104
     "255.255.255.255", "192.0.0.8", "198.18.0.1", "203.0.113.9", "::", "::1", "fe80::1", "fe80::1%eth0",
     "fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"],
)  # fmt: skip
def test_addresses_that_are_nobodys_on_the_internet(address):
    """Loopback, link-local, shared, multicast, reserved, site-local, Teredo around a private."""
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2001:4860:4860::8888", "::ffff:8.8.8.8"])
def test_public_addresses_are_public(address):
    """Else no wildcard would ever be of use."""
    assert is_public(address)
