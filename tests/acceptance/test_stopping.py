"""A run that is asked to end: in good order, by itself, and with nothing lost.

That it takes less than 8 s, on a machine that is not busy, is measured by ``make chaos``.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from contextlib import contextmanager

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Response

from tests.acceptance import product
from tests.acceptance.product import sleeping
from tests.waiting import until

SIGNALS = pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))


def _says(process, words):
    """Read its log until a message holds these words."""
    assert any(words in line for line in process.stderr), f"it ended without saying {words!r}"


def _asked_to_end(process, number):
    """How the process ends by that signal, as ``_ended`` says it."""
    process.send_signal(number)
    return _ended(process)


def _ended(process):
    """Its exit status, its last line, and whether it had to be cut off, once it has ended."""
    said, log = process.communicate()
    (summary_line,) = said.splitlines() or [""]
    return process.returncode, summary_line, product.GRACE_EXCEEDED in log


@pytest.mark.smoke
@SIGNALS
def test_a_signal_releases_what_is_claimed(tmp_path, number, status):
    """Stopped in the middle, a run keeps what is finished, gives the rest back, and says so by its status."""
    rows = [{"id": n, "text": product.SCENE if n < 8 else "hold"} for n in range(40)]
    product.add(tmp_path, *rows)
    with sleeping.running(*JOB, "--batch-size", "4", folder=tmp_path) as process:
        _says(process, '"message": "completed')
        ended, said, cut_off = _asked_to_end(process, number)
    assert (ended, cut_off) == (status, False)
    pictures = len(list((tmp_path / "pictures").iterdir()))
    assert product.counts(tmp_path) == {"pending": 40 - pictures, "completed": pictures}
    assert 0 < pictures < 40
    assert said.startswith(f"completed {pictures}, failed 0, remaining {40 - pictures}; ")
    assert said.endswith("; pictures")


@pytest.fixture
def prompt(tmp_path):
    """A pending prompt."""
    product.add(tmp_path, product.SCENE)


@contextmanager
def _uploading(folder, *, hangs):
    """A run in the middle of an upload that never ends, or waiting for its next try, for ever."""
    reached, over = threading.Event(), threading.Event()

    def handle(upload):
        reached.set()
        if hangs:
            over.wait()
        return Response(status=503)

    folder.mkdir()
    product.add(folder, product.SCENE)
    job = (*JOB[:2], *JOB[4:], "--gcs-bucket", "bucket")
    with HTTPServer(port=0) as server:
        server.expect_request("/storage/v1/b/bucket").respond_with_json({"name": "bucket"})
        server.expect_request(re.compile("/upload/.*"), method="POST").respond_with_handler(handle)
        with sleeping.running(*job, folder=folder, STORAGE_EMULATOR_HOST=server.url_for("")) as process:
            try:
                until(reached.is_set, ended=process.poll)
                yield process
            finally:
                over.set()


@pytest.mark.parametrize("hangs", [True, False], ids=["hangs", "answers 503"])
def test_a_storage_that_hangs_does_not_hold_up_the_stop(tmp_path, hangs):
    """With an upload that never ends, or is retried without an end, a stopped run gives up after its grace,
    with the signal's status, and its prompt is pending again.
    """
    folders = tmp_path / "term", tmp_path / "int"
    with _uploading(folders[0], hangs=hangs) as first, _uploading(folders[1], hangs=hangs) as second:
        second.send_signal(signal.SIGINT)  # both wait at once
        ended = [_asked_to_end(first, signal.SIGTERM), _ended(second)]
    assert [(status, cut_off) for status, _, cut_off in ended] == [(143, True), (130, True)]
    for folder, (_, said, _) in zip(folders, ended, strict=True):
        assert said.startswith("completed 0, failed 0, remaining ")
        assert product.counts(folder) == {"pending": 1}


def test_a_stop_while_the_weights_load(tmp_path, prompt):
    """Asked to end before its model is there, a run with the real engine ends, and its prompt is pending."""
    with product.running(*JOB, folder=tmp_path) as process:
        _says(process, "prompts waiting")
        ended, said, _ = _asked_to_end(process, signal.SIGTERM)
    assert ended == 143
    # A run that is cut off in the midst of loading has no time to ask the database what remains.
    assert re.fullmatch("completed 0, failed 0, remaining (1|unknown); .*; pictures", said)
    assert product.counts(tmp_path) == {"pending": 1}


@SIGNALS
def test_a_stop_while_the_receiver_is_told(tmp_path, prompt, httpserver, number, status):
    """Asked to end while it tries to tell, a run leaves that to the next one; its picture stays."""
    tried = threading.Event()

    def handle(request):
        tried.set()
        return Response(status=503)

    httpserver.expect_request("/told", method="POST").respond_with_handler(handle)
    told = ("--callback-url", httpserver.url_for("/told"), "--callback-patience", "600")
    with sleeping.running(*JOB, *told, folder=tmp_path) as process:
        until(tried.is_set, ended=process.poll)
        ended, _, cut_off = _asked_to_end(process, number)
    assert (ended, cut_off) == (status, False)
    standing = product.run("status", *JOB[:2], folder=tmp_path).stdout
    assert "completed          1" in standing
    assert "1 to be sent" in standing
    assert "completed  1 completed" in standing  # the run's own document


@SIGNALS
def test_a_stop_before_the_database_has_answered(tmp_path, number, status):
    """Asked to end while it waits for a database that says nothing, a run ends with that status."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"mongodb://127.0.0.1:{silent.getsockname()[1]}/art?directConnection=true"
        uri += "&serverSelectionTimeoutMS=3600000"  # it would not end by itself
        with (
            product.running("--mongo-uri", uri, "--output", "pictures", folder=tmp_path) as process,
            silent.accept()[0] as asked,
        ):
            asked.recv(1)
            process.send_signal(number)
            _, log = process.communicate()
    assert (process.returncode, product.GRACE_EXCEEDED in log) == (status, False)


def test_a_second_signal_ends_it_at_once(tmp_path):
    """Asked again, a run does not wait until what hangs is cut off: it ends with the signal's status, without
    a last line. Asked once it would go on until its grace is over, as the test above shows.
    """
    with _uploading(tmp_path / "int", hangs=True) as process:

        def asked_again():
            process.send_signal(signal.SIGINT)  # those of the same moment count as one
            return process.poll() is not None

        until(asked_again)
        said, log = process.communicate()
    assert (process.returncode, said, product.GRACE_EXCEEDED in log) == (130, "", False)


def test_a_device_that_hangs_ends_the_run(tmp_path):
    """With no step for the stall timeout a run ends with status 1, stacks in the log, prompts released."""
    product.add(tmp_path, "hang")
    finished = sleeping.run(*JOB, "--stall-timeout", "1", folder=tmp_path)
    assert finished.returncode == 1
    line = json.loads(product.errors(finished)[-2])
    assert line["message"].startswith("no step for 1 s")
    assert "Thread 0x" in line["stack_trace"]
    assert finished.stdout.startswith("completed 0, failed 0, remaining unknown; ")
    assert product.counts(tmp_path) == {"pending": 1}
