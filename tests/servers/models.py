"""The demo model in a bucket of each service, behind a tap."""

from __future__ import annotations

import uuid
from contextlib import contextmanager
from pathlib import Path

import requests

from tests.servers.s3 import client
from tests.servers.tap import tapped

MODEL = Path(__file__).parents[2] / "text2img" / "demo" / "model"


class Depot:
    """A folder of a bucket that holds a model, by default the demo's: ``url`` names it, ``variables`` lead
    there.
    """

    def __init__(self, kind, server, tap, model=MODEL):
        self.kind, self.tap, self._server = kind, tap, server
        self.folder = f"models/{uuid.uuid4().hex[:8]}"
        self.url = f"{kind}://{server.bucket}/{self.folder}"
        if kind == "gs":
            self.variables = {"STORAGE_EMULATOR_HOST": tap.url}
        else:
            self.variables = {**server.variables, "AWS_ENDPOINT_URL": tap.url}
        for file in model.rglob("*"):
            if file.is_file():
                self.put(str(file.relative_to(model)), file.read_bytes())

    def put(self, name, data):
        """An object in the folder, past the tap."""
        key = f"{self.folder}/{name}"
        if self.kind == "s3":
            client(self._server).put_object(Bucket=self._server.bucket, Key=key, Body=data)
            return
        url = f"{self._server.host}/upload/storage/v1/b/{self._server.bucket}/o"
        asked = {"uploadType": "media", "name": key}
        requests.post(url, params=asked, data=data, timeout=60).raise_for_status()


@contextmanager
def depot(kind, server, model=MODEL):
    """A Depot on that server, for as long as the block lasts."""
    with tapped(server.host if kind == "gs" else server.endpoint) as tap:
        yield Depot(kind, server, tap, model)
