"""One POST to a receiver that behaves or does not."""

from __future__ import annotations

import email.utils
import socket
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import chain, repeat

import pytest
from standardwebhooks import Webhook, WebhookVerificationError
from werkzeug import Response

from tests.servers import free_port
from text2img import __version__
from text2img.databases import Notification, UndeliveredOutcome, webhook_id
from text2img.errors import ConfigurationError
from text2img.prompts import PromptId
from text2img.webhooks.client import CallbackClient
from text2img.webhooks.delivery import DeliveryStatus
from text2img.webhooks.payloads import callback_payload

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
DONE = UndeliveredOutcome(
    id=PromptId("str", "123"), text="a sunset", image_url="gs://b/generated/123.png", seed=7
)


def notification(body="{}", tries=1):
    return Notification(id=webhook_id(), run_id="r", body=body, tries=tries)


def receiver(httpserver, path="/hook", **options):
    return CallbackClient(httpserver.url_for(path), timeout=60, **options)


def answers(httpserver, *responses, path="/hook"):
    for response in responses:
        httpserver.expect_ordered_request(path, method="POST").respond_with_response(response)


@contextmanager
def rude_server(behave):
    """A server on a loopback port that does to its one connection what ``behave`` says."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def serve():
            with listener.accept()[0] as connection:
                behave(connection, over)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/hook"
        finally:
            over.set()
            thread.join()


# One try


@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_2xx_is_told(httpserver, status):
    """Any 2xx means that the receiver has it."""
    answers(httpserver, Response(status=status))
    assert receiver(httpserver).send(notification()).status is DeliveryStatus.DELIVERED


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 410, 422])
def test_other_4xx_is_refused(httpserver, status):
    """410 and its like close the entry, and the detail says what was answered."""
    answers(httpserver, Response(status=status))
    verdict = receiver(httpserver).send(notification())
    assert verdict.status is DeliveryStatus.REJECTED
    assert str(status) in verdict.detail


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(httpserver, status):
    """A redirect is a refusal: neither body nor token goes to another address."""
    httpserver.expect_request("/elsewhere").respond_with_data("")
    answers(httpserver, Response(status=status, headers={"Location": httpserver.url_for("/elsewhere")}))
    assert receiver(httpserver, token="t").send(notification()).status is DeliveryStatus.REJECTED
    assert [request.path for request, _ in httpserver.log] == ["/hook"]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_passing_trouble_is_for_later(httpserver, status):
    """408, 429 and 5xx are tried again, after waits that double up to a minute."""
    answers(httpserver, *[Response(status=status)] * 3)
    waits = [receiver(httpserver).send(notification(tries=tries)).wait for tries in (1, 4, 1000)]
    assert 0.75 <= waits[0] <= 1
    assert 6 <= waits[1] <= 8
    assert 45 <= waits[2] <= 60


@pytest.mark.parametrize(
    ("header", "low", "high"),
    [
        ("7", 7, 7),
        ("86400", 3600, 3600),
        ("99999999999999999999999", 0, 0),
        ("-3", 0, 0),
        ("soon", 0, 0),
        (timedelta(minutes=30), 1200, 1800),
        (timedelta(days=-1), 0, 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600, 3600),
        ("Fri, 99 Dec 99999 23:59:59 GMT", 0, 0),
    ],
)
def test_retry_after_is_honoured(httpserver, header, low, high):
    """Seconds and dates are read, an hour is the most, and nonsense asks for nothing."""
    if isinstance(header, timedelta):  # from when the test runs, not from when it was collected
        header = email.utils.format_datetime(datetime.now(UTC) + header, usegmt=True)
    answers(httpserver, Response(status=429, headers={"Retry-After": header}))
    verdict = receiver(httpserver).send(notification())
    assert verdict.status is DeliveryStatus.RETRY
    assert low <= verdict.retry_after <= high


def test_request_is_what_the_contract_says(httpserver):
    """Body, content type, id, timestamp, token and the sender's name arrive; unsigned without a secret."""
    answers(httpserver, Response(status=200))
    sent, before = notification('{"run_id": "r"}'), int(time.time())
    receiver(httpserver, token="sesame").send(sent)
    [(request, _)] = httpserver.log
    assert request.get_data() == b'{"run_id": "r"}'
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == sent.id
    assert before <= int(request.headers["webhook-timestamp"]) <= time.time()
    assert request.headers["authorization"] == "Bearer sesame"
    assert request.headers["user-agent"] == f"text2img/{__version__}"
    assert "webhook-signature" not in request.headers


def test_signature_verifies(httpserver):
    """Standard Webhooks' own library accepts it, and refuses it once tampered with or stale."""
    answers(httpserver, Response(status=200))
    sent = notification(callback_payload("r", "completed", [DONE], final=True))
    receiver(httpserver, secret=SECRET).send(sent)
    [(request, _)] = httpserver.log
    headers, body = dict(request.headers), request.get_data()
    assert Webhook(SECRET).verify(body, headers)["run_id"] == "r"
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body.replace(b"sunset", b"sunrise"), headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(body, headers | {"Webhook-Timestamp": str(int(time.time()) - 600)})
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "A" * 32).verify(body, headers)


def test_netrc_does_not_meddle(httpserver, monkeypatch, tmp_path):
    """Neither the token nor its absence gives way to a password that a netrc file has for that host."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\nmachine localhost login a password b\n")
    monkeypatch.setenv("NETRC", str(netrc))
    answers(httpserver, Response(status=200), Response(status=200))
    receiver(httpserver, token="sesame").send(notification())
    receiver(httpserver).send(notification())
    assert [request.headers.get("authorization") for request, _ in httpserver.log] == ["Bearer sesame", None]


def test_password_in_the_url_is_used_and_never_shown(httpserver):
    """http://user:password@host signs in by Basic; details show scheme, host and port alone."""
    answers(httpserver, Response(status=403))
    url = httpserver.url_for("/hook?key=planted").replace("://", "://me:planted@")
    verdict = CallbackClient(url).send(notification())
    [(request, _)] = httpserver.log
    assert request.authorization.password == "planted"
    assert request.args["key"] == "planted"
    assert "planted" not in verdict.detail


def test_nobody_there_is_for_later():
    """A refused connection and an unknown name say so, without path, query or password."""
    for host in (f"127.0.0.1:{free_port()}", "no-such-host.invalid"):
        verdict = CallbackClient(f"http://me:planted@{host}/planted?planted").send(notification())
        assert verdict.status is DeliveryStatus.RETRY
        assert "planted" not in verdict.detail
        assert host.split(":")[0] in verdict.detail


def test_connection_cut_is_for_later():
    """A receiver that hangs up without an answer is tried again."""
    with rude_server(lambda connection, over: None) as url:
        assert CallbackClient(url).send(notification()).status is DeliveryStatus.RETRY


def test_silent_receiver_ends_at_the_timeout():
    """A receiver that never answers is given up after the timeout, while it is silent still."""
    with rude_server(lambda connection, over: over.wait()) as url:
        verdict = CallbackClient(url, timeout=0.2).send(notification())
    assert verdict.status is DeliveryStatus.RETRY
    assert "did not answer within 0.2 s" in verdict.detail


def test_trickling_receiver_ends_at_the_timeout():
    """A receiver that sends its headers byte by byte cannot hold us beyond the timeout either."""

    def trickle(connection, over):
        for byte in chain(b"HTTP/1.1 200 OK\r\nx: ", repeat(ord("y"))):
            if over.wait(0.02):  # clock: a server that trickles has to be slow
                return
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                return

    with rude_server(trickle) as url:
        verdict = CallbackClient(url, timeout=0.2).send(notification())
    assert verdict.status is DeliveryStatus.RETRY
    assert "did not answer within 0.2 s" in verdict.detail


def test_endless_answer_is_not_read():
    """A receiver that answers 200 and then sends for ever has been told; its body stays unread."""

    def flood(connection, over):
        try:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while not over.is_set():
                connection.sendall(b"x" * 65536)
        except OSError:
            return

    with rude_server(flood) as url:
        assert CallbackClient(url, timeout=60).send(notification()).status is DeliveryStatus.DELIVERED


# What cannot be used


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "ftp://example.com",
        "file:///etc/passwd",
        "http://",
        "http://a b/",
        "http://x:port/",
        "http://[::1/",
        "http://example.com/\nx",
        "http://" + "a" * 300 + ".com:99999/",
        "//example.com",
    ],
)
def test_url_that_is_none(url):
    """Anything but a http or https address is a configuration error from the start."""
    with pytest.raises(ConfigurationError, match="--callback-url"):
        CallbackClient(url)


@pytest.mark.parametrize(
    "secret", ["", "planted", "whsec_", "whsec_planted!", "whsec_pl_anted-", "MfKQ9r8GKYqrTw=="]
)
def test_secret_that_is_none(secret):
    """A secret that is not whsec_ and base64 is found at once, and not shown."""
    with pytest.raises(ConfigurationError, match="--callback-secret") as caught:
        CallbackClient("http://example.com", secret=secret)
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize("token", ["", "pla nted", "planted\nX-Evil: 1", "plänted"])
def test_token_that_no_header_can_carry(token):
    """A token with a space, a line's end or beyond ASCII is found at once, and not shown."""
    with pytest.raises(ConfigurationError, match="--callback-token") as caught:
        CallbackClient("http://example.com", token=token)
    assert "nted" not in str(caught.value)


def test_nothing_secret_is_shown_by_repr():
    """Neither the receiver's nor a verdict's repr holds secret or token."""
    shown = repr(vars(CallbackClient("http://example.com")))
    assert "example.com" in shown
    assert SECRET not in repr(CallbackClient("http://example.com", secret=SECRET, token="planted"))


# For doctor


@pytest.mark.parametrize(
    ("status", "result"),
    [
        (405, DeliveryStatus.DELIVERED),
        (501, DeliveryStatus.DELIVERED),
        (500, DeliveryStatus.RETRY),
        (503, DeliveryStatus.RETRY),
    ],
)
def test_ping_takes_any_answer_for_life(httpserver, status, result):
    """HEAD with the token, no results sent; 405 and 501, of who knows no HEAD, say somebody is there."""
    httpserver.expect_request("/hook", method="HEAD").respond_with_data("", status=status)
    verdict = receiver(httpserver, token="t", secret=SECRET).ping()
    assert verdict.status is result
    assert str(status) in verdict.detail
    assert [request.method for request, _ in httpserver.log] == ["HEAD"]


def test_ping_finds_nobody():
    """Where nobody listens the reason is given."""
    verdict = CallbackClient(f"http://127.0.0.1:{free_port()}/hook").ping()
    assert verdict.status is DeliveryStatus.RETRY
    assert "refuses connections" in verdict.detail
