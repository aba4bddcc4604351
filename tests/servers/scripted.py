"""Cloud Storage and S3 that give scripted answers in order, and remember what they were asked.

Both have one interface, so that one suite (tests/contract/test_scripted_storage.py) asks the same of both.
A request is noted as what it is for and the version that it is bound to: ``("store", ABSENT)`` is an upload
that must not overwrite, ``("read", None)`` reads an object whatever its version.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from email import message_from_bytes

import google_crc32c
from werkzeug import Response

from tests.clock import Clock
from text2img.storage import StorageOptions
from text2img.storage.gcs import GcsStorage
from text2img.storage.s3 import S3Storage

DATA = b"the picture"
OTHER = b"of another length"
ABSENT = "absent"


class _Scripted:
    """What both have in common.

    ``asked`` lists the requests, ``requests`` has all of each. The storages that it opens have its ``clock``,
    whose pauses a test looks at.
    """

    def __init__(self, httpserver):
        self.host = httpserver.url_for("").rstrip("/")
        self.asked, self.requests, self._answers = [], [], []
        self.clock = Clock()
        httpserver.expect_request(re.compile(self.paths)).respond_with_handler(self._answer)

    def answers(self, *answers):
        """Give these from now on, a triple of status, body and headers for each request."""
        self._answers = list(answers)

    def storage(self, retry_timeout=3.0, timeout=60.0, prefix="p", **options):
        """Return the product's storage at a prefix of the bucket ``bkt``."""
        return self.adapter(
            f"{self.scheme}://bkt/{prefix}",
            StorageOptions(**options),
            retry_timeout=retry_timeout,
            timeout=timeout,
            clock=self.clock,
        )

    def put(self, may_replace=lambda: False, classify=None, **options):
        """Store DATA as ``7.png``."""
        how = () if classify is None else (classify,)
        return self.storage(**options).put("7.png", DATA, "image/png", may_replace, *how)

    def content(self, data=DATA):
        """What a read is answered."""
        return 200, data, {}

    def cut_off(self, data=DATA):
        """The same, but the connection ends before the last bytes."""
        return 200, data[:-3], {"Content-Length": str(len(data))}

    def occupied(self):
        """What a request meets that is bound to a version, where there is another one."""
        return self.refusal(412)

    def gone(self):
        """What is answered of an object that is not there."""
        return self.refusal(404)

    def _answer(self, request):
        self.requests.append(request)
        self.asked.append(self.meaning(request))
        status, body, headers = self._answers.pop(0)
        response = Response(body, status, content_type=self.content_type)
        response.headers.update(headers)  # afterwards, since a body sets its own Content-Length
        return response


class ScriptedGcs(_Scripted):
    """Cloud Storage's JSON API; an object's version is its generation."""

    scheme, adapter, content_type = "gs", GcsStorage, "application/json"
    paths = "/((upload|download)/)?storage/v1/b/bkt.*"

    @property
    def variables(self):
        """What leads Google's client here."""
        return {"STORAGE_EMULATOR_HOST": self.host}

    @staticmethod
    def meaning(request):
        """What the request is for, and which version it is bound to."""
        condition = request.args.get("ifGenerationMatch")
        is_object = "/o/" in request.path
        kinds = {"POST": "store", "DELETE": "delete", "GET": "look" if is_object else "bucket"}
        kind = "read" if request.args.get("alt") == "media" else kinds[request.method]
        return kind, ABSENT if condition == "0" else condition

    @staticmethod
    def version(data):
        """Return the version that an object of that content has here."""
        return str(zlib.crc32(data) + 1)

    def stored(self, data=DATA, **fields):
        """What is said of an object as it is stored."""
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()  # noqa: S324 - what Cloud Storage reports
        about = {"name": "p/7.png", "bucket": "bkt", "generation": self.version(data), "size": str(len(data))}
        return 200, json.dumps(about | {"md5Hash": md5} | fields), {}

    def done(self):
        """What is said to a request that is carried out."""
        return self.stored()

    @staticmethod
    def refusal(status, message="no"):
        """What is said to one that is not."""
        return status, json.dumps({"error": {"code": status, "message": message}}), {}

    def garbled(self):
        """What is said to an upload whose sum is not that of the bytes that came."""
        return self.refusal(400, 'Provided CRC32C "a" doesn\'t match calculated CRC32C "b".')

    def forbidden_to_see_the_bucket(self):
        """All that a check gets for an account that may only write."""
        return [self.refusal(403)]

    def trial(self):
        """What doctor's own object meets, but for its deletion."""
        return [self.done()]

    def upload(self):
        """Return content type and bytes of the one upload, and whether it names the right sum."""
        (request,) = self.requests
        head = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
        about, sent = message_from_bytes(head + request.get_data()).get_payload()
        data = sent.get_payload(decode=True)
        crc32c = base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()
        return sent.get_content_type(), data, json.loads(about.get_payload())["crc32c"] == crc32c


class ScriptedS3(_Scripted):
    """S3's REST API; an object's version is its ETag."""

    scheme, adapter, content_type = "s3", S3Storage, "application/xml"
    paths = "/bkt.*"

    @property
    def variables(self):
        """What leads boto3 here."""
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        return {"AWS_ENDPOINT_URL": self.host, "AWS_CONFIG_FILE": "/dev/null", **keys}

    @staticmethod
    def meaning(request):
        """What the request is for, and which version it is bound to."""
        kinds = {"PUT": "store", "DELETE": "delete", "HEAD": "look", "GET": "read"}
        of_bucket = {"HEAD": "bucket", "GET": "list"}
        kind = (kinds if request.path.count("/") > 1 else of_bucket)[request.method]
        condition = ABSENT if request.headers.get("If-None-Match") == "*" else request.headers.get("If-Match")
        return kind, condition

    @staticmethod
    def version(data):
        """Return the version that an object of that content has here."""
        return f'"{hashlib.md5(data).hexdigest()}"'  # noqa: S324 - what S3 reports

    def stored(self, data=DATA, etag=None):
        """An object as it is stored; its ETag is its MD5 unless another is given."""
        return 200, data, {"ETag": etag or self.version(data)}

    def done(self):
        """What is said to a request that is carried out."""
        return 200, b"", {"ETag": self.version(DATA)}

    @staticmethod
    def refusal(status, message="no", code="Refused", **headers):
        """What is said to one that is not."""
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
        return status, body.encode(), headers

    def garbled(self):
        """What is said to an upload whose sum is not that of the bytes that came."""
        return self.refusal(400, code="BadDigest")

    def forbidden_to_see_the_bucket(self):
        """All that a check gets for an account that may only write."""
        return [self.refusal(403), self.refusal(403, code="AccessDenied")]

    def trial(self):
        """What doctor's own object meets, but for its deletion."""
        return [self.done(), self.occupied(), self.stored(b"text2img doctor")]

    def upload(self):
        """Return content type and bytes of the one upload, and whether it names the right sum."""
        (request,) = self.requests
        md5 = base64.b64encode(hashlib.md5(request.get_data()).digest()).decode()  # noqa: S324
        headers = request.headers
        return headers["Content-Type"], request.get_data(), headers["Content-MD5"] == md5
