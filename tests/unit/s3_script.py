"""An S3 that answers as it is told, one answer after the other, and remembers what it was asked."""

from __future__ import annotations

import hashlib
import re

from werkzeug import Response

from text2img.storage import StorageOptions
from text2img.storage.s3 import S3Storage

DATA = b"the picture"
ETAG = f'"{hashlib.md5(DATA).hexdigest()}"'  # noqa: S324 - what S3 reports


class Script:
    """The server; ``asked`` holds method and condition of each request, ``requests`` all of it."""

    def __init__(self, httpserver):
        self.asked, self.requests, self._answers = [], [], []
        self.endpoint = httpserver.url_for("").rstrip("/")
        httpserver.expect_request(re.compile("/bkt.*")).respond_with_handler(self._answer)

    def answers(self, *answers):
        self._answers = list(answers)

    def _answer(self, request):
        self.requests.append(request)
        condition = request.headers.get("If-None-Match") or request.headers.get("If-Match")
        self.asked.append((request.method, condition))
        status, body, headers = self._answers.pop(0)
        return Response(body, status=status, headers=headers, content_type="application/xml")


def done(**headers):
    """What S3 says to a write that it took, to a delete, or for a bucket that is there."""
    return 200, b"", {"ETag": ETAG, **headers}


def refusal(status, code="Refused", message="no", **headers):
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return status, body.encode(), headers


def stored(data=DATA, etag=None):
    """An object as it is stored; its ETag is its MD5 unless another is given."""
    return 200, data, {"ETag": etag or f'"{hashlib.md5(data).hexdigest()}"'}  # noqa: S324


def storage(patience=3.0, url="s3://bkt/p", **options):
    return S3Storage(url, StorageOptions(**options), patience=patience, timeout=2)


def put(may_replace=lambda: False, patience=3.0, **options):
    return storage(patience, **options).put("7.png", DATA, "image/png", may_replace)
