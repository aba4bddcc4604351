"""Which group of series at which Pushgateway a URL means."""

from __future__ import annotations

import pytest

from text2img.errors import ConfigurationError
from text2img.telemetry.metrics import Gateway


@pytest.mark.parametrize(
    ("url", "base", "job", "group"),
    [
        ("http://gateway:9091", "http://gateway:9091", "text2img", {"instance": "host-7"}),
        ("https://gateway/hub/", "https://gateway/hub/", "text2img", {"instance": "host-7"}),
        ("http://[::1]:9091/metrics/job/night", "http://[::1]:9091", "night", {}),
        ("http://g/hub/metrics/job/n%20s/team/a%2Fb", "http://g/hub", "n s", {"team": "a/b"}),
    ],
)
def test_a_url_names_a_gateway_and_perhaps_a_group(url, base, job, group):
    """Without a group in it, it is the job's own, by this instance."""
    gateway = Gateway.parse(url, "host-7")
    assert (gateway.url, gateway.job, gateway.group) == (base, job, group)


def test_the_password_is_apart_and_not_shown():
    """It is sent as what it says, and stands neither in the URL nor in what is printed of the gateway."""
    gateway = Gateway.parse("http://n%40ight:hush%2Fword@gateway:9091", "host-7")
    assert (gateway.user, gateway.password) == ("n@ight", "hush/word")
    assert "hush" not in gateway.url + repr(gateway)


@pytest.mark.parametrize(
    "url", ["gateway:9091", "ftp://gateway", "http://", "http://g:x/", "http://hush@g/metrics/job/a/b"]
)
def test_what_is_no_gateway_is_refused(url):
    """By a line that names the option and shows nothing of the URL."""
    with pytest.raises(ConfigurationError, match="--pushgateway") as refused:
        Gateway.parse(url, "host-7")
    assert "hush" not in str(refused.value)
