"""S3 for tests: moto's server, in a process of its own, which keeps conditions as Amazon's does."""

from __future__ import annotations

import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import pytest

from tests.servers import free_port, running


@dataclass(frozen=True)
class S3Server:
    """Where it listens (for AWS_ENDPOINT_URL), and the bucket that is there."""

    endpoint: str
    bucket: str = "pictures"

    @property
    def variables(self):
        """What a process needs to talk to it."""
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        return {"AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": "us-east-1", **keys}


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """An S3 server of this test session, in memory."""
    with s3_in(tmp_path_factory.mktemp("s3")) as server:
        yield server


@contextmanager
def s3_in(folder):
    """A server that writes its log into that folder, for as long as the block lasts."""
    port = free_port()
    server = S3Server(f"http://127.0.0.1:{port}")
    with running("moto_server", ["-H", "127.0.0.1", "-p", str(port)], folder, lambda: _answers(server)):
        yield server


@pytest.fixture
def s3(s3_server, monkeypatch):
    """The session's S3 server, which boto3 in this process then talks to."""
    for name, value in s3_server.variables.items():
        monkeypatch.setenv(name, value)
    return s3_server


@cache
def client(server):
    """boto3's client, past the adapter; one for each server, since making one takes 0.1 s."""
    import boto3

    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    return boto3.client("s3", endpoint_url=server.endpoint, region_name="us-east-1", **keys)


def _answers(server):
    """Whether it is up; the first answer also makes the bucket."""
    request = urllib.request.Request(f"{server.endpoint}/{server.bucket}", method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
