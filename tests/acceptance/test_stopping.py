"""A run that is asked to end: in good order, soon, and with nothing lost."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import threading
import time

import pytest
from werkzeug import Response

from tests.acceptance import product

SIGNALS = pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))


def _says(process, words):
    """Read its log until a message holds these words."""
    assert any(words in line for line in process.stderr), f"it ended without saying {words!r}"


def _asked_to_end(process, number):
    """Its exit status, and whether it ended soon enough."""
    asked = time.monotonic()
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    (process.last_line,) = said.splitlines() or [""]
    return process.returncode, time.monotonic() - asked < product.soon()


@pytest.mark.slow
@SIGNALS
def test_a_signal_releases_what_is_claimed(tmp_path, number, status):
    """Stopped in the middle, a run keeps what is finished, gives the rest back, and says so by its status."""
    rows = [{"id": n, "text": "a large red circle on a blue background"} for n in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert product.run("enqueue", *JOB[:2], "prompts.jsonl", folder=tmp_path).returncode == 0
    slowly = ("--batch-size", "4", "--num-inference-steps", "20")
    with product.running(*JOB, *slowly, folder=tmp_path) as process:
        _says(process, '"message": "completed')
        assert _asked_to_end(process, number) == (status, True)
        said = process.last_line
    pictures = len(list((tmp_path / "pictures").iterdir()))
    status_lines = product.run("status", *JOB[:2], folder=tmp_path).stdout.splitlines()
    standing = {line.split()[0]: int(line.split()[1]) for line in status_lines[:4]}
    assert standing == {"pending": 40 - pictures, "processing": 0, "completed": pictures, "error": 0}
    assert 0 < pictures < 40
    assert said.startswith(f"completed {pictures}, failed 0, remaining {40 - pictures}; ")
    assert said.endswith("; pictures")


@pytest.fixture
def prompt(tmp_path):
    """A pending prompt."""
    (tmp_path / "prompts.txt").write_text("a large red circle on a blue background\n")
    assert product.run("enqueue", *JOB[:2], "prompts.txt", folder=tmp_path).returncode == 0


def _waits(folder):
    return "pending            1" in product.run("status", *JOB[:2], folder=folder).stdout


@pytest.fixture(params=["hangs", "answers 503"])
def uploading(request, tmp_path, httpserver, prompt):
    """A run in the middle of an upload that never ends, or waiting for its next try, for ever."""
    reached, end = threading.Event(), threading.Event()

    def handle(upload):
        reached.set()
        if request.param == "hangs":
            end.wait(120)
        return Response(status=503)

    httpserver.expect_request("/storage/v1/b/bucket").respond_with_json({"name": "bucket"})
    httpserver.expect_request(re.compile("/upload/.*"), method="POST").respond_with_handler(handle)
    job = (*JOB[:2], *JOB[4:], "--gcs-bucket", "bucket", "--num-inference-steps", "2")
    with product.running(*job, folder=tmp_path, STORAGE_EMULATOR_HOST=httpserver.url_for("")) as process:
        try:
            assert reached.wait(120)
            yield process
        finally:
            end.set()


@pytest.mark.slow
@SIGNALS
def test_a_storage_that_hangs_does_not_hold_up_the_stop(tmp_path, uploading, number, status):
    """With an upload that never ends, or is tried again for ever, a stopped run gives up within 8 s, and its
    prompt is pending again.
    """
    assert _asked_to_end(uploading, number) == (status, True)
    assert uploading.last_line.startswith("completed 0, failed 0, remaining ")
    assert _waits(tmp_path)


@pytest.mark.slow
@SIGNALS
def test_a_stop_while_the_weights_load(tmp_path, prompt, number, status):
    """Asked to end before its model is there, a run ends within 8 s, and its prompt is pending."""
    with product.running(*JOB, folder=tmp_path) as process:
        _says(process, "prompts waiting")
        assert _asked_to_end(process, number) == (status, True)
        # A run that is cut off in the midst of loading has no time to ask the database what remains.
        assert re.fullmatch("completed 0, failed 0, remaining (1|unknown); .*; pictures", process.last_line)
    assert _waits(tmp_path)


@pytest.mark.slow
@SIGNALS
def test_a_stop_while_the_receiver_is_told(tmp_path, prompt, httpserver, number, status):
    """Asked to end while it tries to tell, a run leaves that to the next one; its picture stays."""
    tried = threading.Event()

    def handle(request):
        tried.set()
        return Response(status=503)

    httpserver.expect_request("/told", method="POST").respond_with_handler(handle)
    told = ("--callback-url", httpserver.url_for("/told"), "--callback-patience", "600")
    with product.running(*JOB, "--num-inference-steps", "1", *told, folder=tmp_path) as process:
        assert tried.wait(120)
        assert _asked_to_end(process, number) == (status, True)
    standing = product.run("status", *JOB[:2], folder=tmp_path).stdout
    assert "completed          1" in standing
    assert "1 still to be told" in standing
    assert "completed  1 completed" in standing  # the run's own document


@pytest.mark.slow
@SIGNALS
def test_a_stop_before_the_database_has_answered(tmp_path, number, status):
    """Asked to end while it waits for a database that says nothing, a run ends soon, with that status."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"mongodb://127.0.0.1:{silent.getsockname()[1]}/art?directConnection=true"
        with product.running("--mongo-uri", uri, "--output", "pictures", folder=tmp_path) as process:
            silent.settimeout(120)
            with silent.accept()[0] as asked:
                asked.recv(1)
                assert _asked_to_end(process, number) == (status, True)


@pytest.mark.slow
@pytest.mark.parametrize("uploading", ["hangs"], indirect=True)
def test_a_second_signal_ends_it_at_once(uploading):
    """Whoever asks twice does not wait: the process is gone within two seconds, by the signal's status."""
    uploading.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        uploading.wait(1)  # once asked, it is still putting things in order
    uploading.send_signal(signal.SIGINT)
    assert uploading.wait(2) == 130


@pytest.mark.slow
def test_a_device_that_hangs_ends_the_run(tmp_path):
    """With no step for the stall timeout a run ends with status 1, stacks in the log, prompts released."""
    (tmp_path / "prompts.txt").write_text("a large red circle on a blue background\n")
    assert product.run("enqueue", *JOB[:2], "prompts.txt", folder=tmp_path).returncode == 0
    # No device hangs to order: a timeout far below what a step takes looks the same from the outside.
    finished = product.run(*JOB, "--num-inference-steps", "50", "--stall-timeout", "0.001", folder=tmp_path)
    assert finished.returncode == 1
    message = json.loads(product.errors(finished)[-2])["message"]
    assert message.startswith("no step for 0.001 s")
    assert "Thread 0x" in message
    assert finished.stdout.startswith("completed 0, failed 0, remaining unknown; ")
    assert "pending            1" in product.run("status", *JOB[:2], folder=tmp_path).stdout
