"""URLs of services that are wrong in scheme, certificate or bucket: the setting is named, before any work."""

from __future__ import annotations

import socket
import ssl
import threading
from contextlib import contextmanager, suppress

import pytest

from tests.unit.engine.test_hosted_protocol import certificate  # noqa: F401 - a fixture
from text2img.databases import Collections, open_database
from text2img.databases.mongo import session
from text2img.errors import ConfigurationError
from text2img.storage import StorageOptions, open_storage
from text2img.webhooks.client import CallbackClient

BUCKET = "pictures-of-ours"
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: text/plain\r\n\r\n"
TLS_ONLY = BAD_REQUEST + b"Client sent an HTTP request to an HTTPS server.\n"


@contextmanager
def answering(answer: bytes, tls: ssl.SSLContext | None = None):
    """A server that gives each connection that answer to whatever it says; yields its host and port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                taken, _ = listener.accept()
            except OSError:
                return
            with taken, suppress(OSError):
                if tls is None:
                    _answer(taken, answer)
                    continue
                with tls.wrap_socket(taken, server_side=True) as connection:
                    _answer(connection, answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def _answer(connection, answer):
    connection.recv(65_536)
    connection.sendall(answer)


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    """Credentials, and no endpoint in the environment."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_CA_BUNDLE", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "a")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return monkeypatch


@pytest.fixture
def tls(certificate):  # noqa: F811 - the fixture
    """What a server needs to speak TLS by a certificate that only the tests trust."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


def s3(endpoint: str | None = None):
    """S3's storage, as the output names it."""
    return open_storage(f"s3://{BUCKET}/generated", StorageOptions(s3_endpoint=endpoint))


def refused(action, *named: str) -> None:
    """Check that the action is refused as wrong configuration, with these words."""
    with pytest.raises(ConfigurationError) as caught:
        action()
    assert all(word in str(caught.value) for word in named), caught.value


@pytest.mark.parametrize(
    ("variable", "url", "advice"),
    [
        ("AWS_ENDPOINT_URL", f"https://{BUCKET}.s3.eu-north-1.amazonaws.com", "https://s3.eu-north-1.amazon"),
        ("AWS_ENDPOINT_URL_S3", f"https://s3.example.com/{BUCKET}/", "write https://s3.example.com"),
        (None, f"http://127.0.0.1:9000/{BUCKET}", "write http://127.0.0.1:9000"),
        (None, f"https://{BUCKET}.nyc3.digitaloceanspaces.com/", "https://nyc3.digitalocean"),
    ],
)
def test_an_endpoint_with_the_bucket_in_it(keys, variable, url, advice) -> None:
    """The bucket's name before the host or behind it: the message says what to write in its place."""
    if variable:
        keys.setenv(variable, url)
    setting = variable or "--s3-endpoint (S3_ENDPOINT)"
    refused(lambda: s3(None if variable else url), setting, f"contains the bucket {BUCKET}", advice)


@pytest.mark.parametrize(
    ("bucket", "endpoint"),
    [
        ("minio", "https://minio.example.com"),
        ("nyc3", "https://nyc3.digitaloceanspaces.com"),
        ("storage", "https://storage.googleapis.com"),
        ("pictures", "https://pictures.internal:9000/s3"),
    ],
)
def test_a_bucket_may_be_called_like_a_host(bucket, endpoint) -> None:
    """An endpoint that only begins with the bucket's name is taken as it is."""
    assert open_storage(f"s3://{bucket}", StorageOptions(s3_endpoint=endpoint)) is not None


@pytest.mark.parametrize("answer", [BAD_REQUEST, TLS_ONLY], ids=["an answer of 400", "a server that says so"])
@pytest.mark.parametrize("method", ["check", "check_writable"])
def test_http_where_the_server_speaks_tls(keys, answer, method) -> None:
    """S3 and Cloud Storage, at the start of a run and by doctor: the variable and ``https://``."""
    with answering(answer) as address:
        keys.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        keys.setenv("STORAGE_EMULATOR_HOST", f"http://{address}")
        refused(getattr(s3(), method), "AWS_ENDPOINT_URL", "https://")
        gcs = open_storage(f"gs://{BUCKET}", StorageOptions())
        refused(getattr(gcs, method), "STORAGE_EMULATOR_HOST", "https://")


@pytest.mark.parametrize("method", ["check", "check_writable"])
def test_https_where_the_server_speaks_http(keys, method) -> None:
    """The same the other way around."""
    with answering(BAD_REQUEST) as address:
        keys.setenv("STORAGE_EMULATOR_HOST", f"https://{address}")
        refused(getattr(s3(f"https://{address}"), method), "S3_ENDPOINT", "write http://")
        gcs = open_storage(f"gs://{BUCKET}", StorageOptions())
        refused(getattr(gcs, method), "STORAGE_EMULATOR_HOST", "write http://")


def test_a_certificate_that_is_not_trusted(keys, tls, certificate) -> None:  # noqa: F811 - the fixture
    """S3, Cloud Storage and MongoDB: each names where to put the issuer's certificate."""
    keys.setattr(session, "CONNECT_TIMEOUT", 0.3)
    with answering(BAD_REQUEST, tls) as address:
        url = f"https://{address}"
        keys.setenv("STORAGE_EMULATOR_HOST", url)
        refused(s3(url).check, "S3_ENDPOINT", "certificate is not trusted", "AWS_CA_BUNDLE")
        gcs = open_storage(f"gs://{BUCKET}", StorageOptions())
        refused(gcs.check, "STORAGE_EMULATOR_HOST", "certificate is not trusted", "REQUESTS_CA_BUNDLE")
        mongo = f"mongodb://{address}/?tls=true"
        refused(lambda: open_database(mongo, Collections()), "certificate is not trusted", "tlsCAFile")
        receiver = CallbackClient(f"{url}/", secret=None, token=None)
        detail = receiver.ping().detail
        keys.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert "not trusted" not in receiver.ping().detail
    assert "certificate is not trusted" in detail
    assert "REQUESTS_CA_BUNDLE" in detail
