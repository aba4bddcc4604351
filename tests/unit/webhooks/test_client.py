"""One request to a prompt's own webhook: what it holds, whom it reaches, and whom it never does."""

from __future__ import annotations

import socket
import threading

import pytest
from standardwebhooks import Webhook as Verifier
from werkzeug import Response

from tests.servers import free_port
from text2img.databases import Notification, webhook_id
from text2img.prompts.ids import HostAllowlist, Webhook
from text2img.webhooks.client import Webhooks
from text2img.webhooks.delivery import DeliveryStatus
from text2img.webhooks.payloads import Credentials
from text2img.webhooks.progress import ProgressUpdate

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
PLACE = "/api/webhooks/inference"


def webhooks(hosts="127.0.0.1, localhost", timeout=60.0, **credentials):
    return Webhooks(HostAllowlist.parse(hosts), Credentials(**credentials), timeout)


def notification(base, word="complete", body='{"generation_id": "a"}', tries=1):
    webhook = Webhook.of(base)
    url, origin = webhook.to(word), webhook.origin
    return Notification(id=webhook_id(), run_id="r", body=body, tries=tries, url=url, origin=origin)


def base(httpserver, host="127.0.0.1"):
    return f"http://{host}:{httpserver.port}"


def test_a_notice_is_posted_with_its_headers(httpserver):
    """Body, id, timestamp, token, source and a signature that Standard Webhooks' own library accepts."""
    httpserver.expect_request(f"{PLACE}/failed", method="POST").respond_with_data("")
    sent = notification(base(httpserver), "failed")
    verdict = webhooks(secret=SECRET, token="sesame").send(sent)
    [(request, _)] = httpserver.log
    assert verdict.status is DeliveryStatus.DELIVERED
    assert request.get_data() == sent.body.encode()
    assert request.headers["authorization"] == "Bearer sesame"
    assert request.headers["x-request-source"] == "inference-server"
    assert request.headers["webhook-id"] == sent.id
    assert request.headers["content-type"] == "application/json"
    assert Verifier(SECRET).verify(request.get_data(), dict(request.headers)) == {"generation_id": "a"}


def test_progress_is_patched(httpserver):
    """One PATCH with the milestone, signed and with the token; its answer, whatever it is, is no error."""
    httpserver.expect_request(f"{PLACE}/progress", method="PATCH").respond_with_data("", status=500)
    sender = webhooks(secret=SECRET, token="sesame")
    sender.progress(base(httpserver), '"a"', ProgressUpdate(25, 13, 50, 2))
    sender.progress(f"http://127.0.0.1:{free_port()}", '"a"', ProgressUpdate(50, 25, 50, 0))
    [(request, _)] = httpserver.log
    assert request.get_json() == {
        "generation_id": "a",
        "progress": {
            "current_step": 13, "total_steps": 50, "progress_percent": 25, "estimated_seconds": 2
        },
    }  # fmt: skip
    assert request.headers["authorization"] == "Bearer sesame"
    assert Verifier(SECRET).verify(request.get_data(), dict(request.headers))


@pytest.mark.parametrize(
    ("status", "result"),
    [(204, DeliveryStatus.DELIVERED), (410, DeliveryStatus.REJECTED), (422, DeliveryStatus.REJECTED),
     (503, DeliveryStatus.RETRY), (429, DeliveryStatus.RETRY)],
)  # fmt: skip
def test_answers_mean_what_a_callbacks_do(httpserver, status, result):
    """2xx is told, other 4xx is refused, 429 and 5xx come again, when the backend asks for it."""
    answer = Response(status=status, headers={"Retry-After": "7"})
    httpserver.expect_request(f"{PLACE}/complete").respond_with_response(answer)
    verdict = webhooks().send(notification(base(httpserver)))
    assert (verdict.status, verdict.retry_after) == (result, 7 if result is DeliveryStatus.RETRY else 0)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(httpserver, status):
    """Not even to a host that may be told: the token goes nowhere else."""
    headers = {"Location": httpserver.url_for("/elsewhere")}
    httpserver.expect_request(f"{PLACE}/complete").respond_with_response(
        Response(status=status, headers=headers)
    )
    assert webhooks(token="sesame").send(notification(base(httpserver))).status is DeliveryStatus.REJECTED
    assert [request.path for request, _ in httpserver.log] == [f"{PLACE}/complete"]


def test_a_host_that_this_run_may_not_tell_is_left_to_another(httpserver):
    """A notice that an earlier run left is not sent, and not lost: nothing reaches the host."""
    verdict = webhooks("backend.example", token="sesame").send(notification(base(httpserver)))
    assert verdict.status is DeliveryStatus.RETRY
    assert "--webhook-host" in verdict.detail
    assert httpserver.log == []


@pytest.mark.parametrize("url", [None, "gopher://x", "http://a@b"])
def test_an_address_that_is_none_is_refused(url):
    """As somebody may have changed it in the database."""
    sent = Notification(id="msg_1", run_id="r", body="{}", url=url, origin="x")
    assert webhooks().send(sent).status is DeliveryStatus.REJECTED


def test_a_proxy_of_the_environment_is_not_asked(httpserver, monkeypatch):
    """It would look names up itself: no webhook goes by it, neither to a trusted host nor to another."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    assert webhooks().send(notification(base(httpserver))).status is DeliveryStatus.DELIVERED


@pytest.fixture
def names(monkeypatch):
    """Names that lead where a test says, as a hostile owner's name server would; each look-up is kept."""
    retry_after, known, ask = [], {}, socket.getaddrinfo

    def getaddrinfo(host, port, *rest, **named):
        retry_after.append(host)
        answers = known.get(host)
        if not answers:
            return ask(host, port, *rest, **named)
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        kinds = [(socket.AF_INET6 if ":" in each else socket.AF_INET, each) for each in addresses]
        return [(kind, socket.SOCK_STREAM, 6, "", (each, port)) for kind, each in kinds]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return known, retry_after


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["::ffff:127.0.0.1"],
        ["8.8.8.8", "127.0.0.1"],
        ["10.0.0.1"],
        ["169.254.169.254"],
        ["::1"],
    ],
)
def test_a_name_below_a_wildcard_must_lead_to_public_addresses(httpserver, names, addresses):
    """A server that listens there hears nothing, not even that somebody connects."""
    known, _ = names
    known["evil.wild.example"] = [addresses]
    url = base(httpserver, "evil.wild.example")
    verdict = webhooks("*.wild.example", token="sesame").send(notification(url))
    assert verdict.status is DeliveryStatus.RETRY
    assert "not public" in verdict.detail
    assert httpserver.log == []


def test_a_name_that_is_exactly_given_may_be_private(httpserver, names):
    """The operator has said so, also where a wildcard matches it as well."""
    known, _ = names
    known["in.wild.example"] = [["127.0.0.1"]]
    httpserver.expect_request(f"{PLACE}/complete").respond_with_data("")
    sender = webhooks("*.wild.example, in.wild.example")
    assert sender.send(notification(base(httpserver, "in.wild.example"))).status is DeliveryStatus.DELIVERED


def test_rebinding_gains_nothing(names, monkeypatch):
    """The name leads to a public address first and home the next time: it is connected to the first."""
    known, retry_after = names
    known["evil.wild.example"] = [["93.184.216.34"], ["127.0.0.1"]]
    connected, refuse = [], OSError("nobody is told in a test")

    def connect(self, address):
        connected.append(address[0])
        raise refuse

    with socket.create_server(("127.0.0.1", 0)) as private:
        monkeypatch.setattr(socket.socket, "connect", connect)
        url = f"http://evil.wild.example:{private.getsockname()[1]}"
        assert webhooks("*.wild.example").send(notification(url)).status is DeliveryStatus.RETRY
    assert connected == ["93.184.216.34"]
    assert retry_after.count("evil.wild.example") == 1


@pytest.mark.parametrize("number", ["2130706433", "127.1", "0x7f000001", "0177.0.0.1"])
def test_odd_ways_to_write_an_address_are_names_that_nobody_gave(httpserver, number):
    """Though the operating system would read them as 127.0.0.1, which may be told."""
    verdict = webhooks(token="sesame").send(notification(base(httpserver, number)))
    assert verdict.status is DeliveryStatus.RETRY
    assert httpserver.log == []


def test_tls_asks_for_the_name_and_not_for_the_address(names, monkeypatch):
    """The address is checked and connected to; the name stands in the handshake."""
    known, _ = names
    known["tls.wild.example"] = [["93.184.216.34"]]
    connect = socket.socket.connect
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(socket.socket, "connect", lambda self, _: connect(self, ("127.0.0.1", port)))
        heard = []

        def listen():
            connection, _ = server.accept()
            with connection:
                heard.append(connection.recv(4096))

        thread = threading.Thread(target=listen)
        thread.start()
        verdict = webhooks("*.wild.example").send(notification("https://tls.wild.example"))
        thread.join()
    assert verdict.status is DeliveryStatus.RETRY
    assert b"tls.wild.example" in heard[0]


def test_a_backend_that_hangs_costs_its_timeout(httpserver):
    """A try ends though the backend does not answer, and is for later."""
    over = threading.Event()
    httpserver.expect_request(f"{PLACE}/complete").respond_with_handler(lambda _: over.wait() and Response())
    try:
        verdict = webhooks(timeout=0.2).send(notification(base(httpserver)))
    finally:
        over.set()
    assert verdict.status is DeliveryStatus.RETRY
    assert "did not answer" in verdict.detail
