"""Over TLS: fal's own client and this job's speak the same protocol to the same server."""

from __future__ import annotations

import datetime as dt
import importlib.util
import ipaddress
import json
import os
import ssl
import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.hosted import generate, request
from tests.servers import unavailable
from tests.servers.fal import KEY, fal_server
from text2img.engine import GeneratedImage
from text2img.errors import DeviceFailed

CLIENT = """
import json, os, fal_client
updates = []
result = fal_client.subscribe(
    "fal-ai/flux/dev",
    {"prompt": "a boat", "seed": 4, "image_size": {"width": 64, "height": 64}},
    with_logs=True,
    on_queue_update=lambda update: updates.append(type(update).__name__),
)
handle = fal_client.submit("fal-ai/flux/dev", {"prompt": "late", "seed": 4, "image_size": {}})
handle.cancel()
print(json.dumps({"updates": updates, "result": result}))
"""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A file with the certificate of 127.0.0.1, signed by itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now, day = dt.datetime.now(dt.UTC), dt.timedelta(days=1)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now - day, now + day
    )
    signed = (
        builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(key.private_bytes(*plain) + signed.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
def secure(certificate):
    """The service over https://, as fal's own is."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with fal_server(tls) as server:
        yield server


def test_the_official_client_takes_this_server_for_fal(secure, certificate):
    """What the tests' server says is what fal's own client expects, from queued to completed or cancelled."""
    if importlib.util.find_spec("fal_client") is None:
        unavailable("fal-client is not installed; pip install -e '.[test]'")
    host = secure.url.removeprefix("https://")
    variables = {"FAL_QUEUE_RUN_HOST": host, "FAL_KEY": KEY, "SSL_CERT_FILE": str(certificate)}
    command = [sys.executable, "-c", CLIENT]
    kept = {"PATH": os.environ["PATH"], **variables}
    made = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=60, check=False)
    assert made.returncode == 0, made.stderr
    said = json.loads(made.stdout)
    assert said["updates"] == ["Queued", "InProgress", "Completed"]
    assert said["result"]["images"][0]["url"].startswith(f"{secure.url}/files/")
    assert said["result"]["seed"] == 4
    assert secure.cancelled == ["late"]


def test_a_picture_over_tls(secure, certificate, monkeypatch):
    """With a certificate that is trusted the picture comes; without, not even the key goes out."""
    with pytest.raises(DeviceFailed, match=r"127\.0\.0\.1 cannot be reached \(SSLError\)"):
        generate(secure, request(), retry_timeout=0.5)
    assert secure.asked == {}
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    assert isinstance(generate(secure)[0], GeneratedImage)
