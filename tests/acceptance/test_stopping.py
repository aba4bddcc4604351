"""A run that is asked to end: in good order, soon, and with nothing lost."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time

import pytest
from werkzeug import Response

from tests.acceptance import product

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_releases_what_is_claimed(tmp_path, number, status):
    """Stopped in the middle, a run keeps what is finished, gives the rest back, and says so by its status."""
    rows = [{"id": n, "text": "a large red circle on a blue background"} for n in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert product.run("enqueue", *JOB[:2], "prompts.jsonl", folder=tmp_path).returncode == 0
    with subprocess.Popen(
        product.command(*JOB, "--batch-size", "4", "--num-inference-steps", "20"),
        cwd=tmp_path,
        env=product.environment(tmp_path),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stderr:
            if json.loads(line)["message"].startswith("completed"):
                break
        process.send_signal(number)
        started = time.monotonic()
        rest = process.stderr.read()
        assert process.wait(timeout=30) == status, rest
        assert time.monotonic() - started < 8
    pictures = len(list((tmp_path / "pictures").iterdir()))
    status_lines = product.run("status", *JOB[:2], folder=tmp_path).stdout.splitlines()
    standing = {line.split()[0]: int(line.split()[1]) for line in status_lines[:4]}
    assert standing == {"pending": 40 - pictures, "processing": 0, "completed": pictures, "error": 0}
    assert 0 < pictures < 40


@pytest.fixture
def uploading(tmp_path, httpserver):
    """A run in the middle of an upload that never ends."""
    (tmp_path / "prompts.txt").write_text("a large red circle on a blue background\n")
    assert product.run("enqueue", *JOB[:2], "prompts.txt", folder=tmp_path).returncode == 0
    hangs, end = threading.Event(), threading.Event()

    def hang(request):
        hangs.set()
        end.wait(60)
        return Response(status=503)

    httpserver.expect_request("/storage/v1/b/hanging").respond_with_json({"name": "hanging"})
    httpserver.expect_request(re.compile("/upload/.*"), method="POST").respond_with_handler(hang)
    process = subprocess.Popen(
        product.command(*JOB[:2], *JOB[4:], "--gcs-bucket", "hanging", "--num-inference-steps", "2"),
        cwd=tmp_path,
        env=product.environment(tmp_path, STORAGE_EMULATOR_HOST=httpserver.url_for("")),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert hangs.wait(60)
        yield process
    finally:
        end.set()
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_storage_that_hangs_does_not_hold_up_the_stop(tmp_path, uploading):
    """With an upload that never ends, a stopped run gives up within 8 s, and its prompt is pending again."""
    started = time.monotonic()
    uploading.send_signal(signal.SIGTERM)
    _, errors = uploading.communicate(timeout=30)
    assert (uploading.returncode, time.monotonic() - started < 8) == (143, True), errors
    assert "pending            1" in product.run("status", *JOB[:2], folder=tmp_path).stdout


@pytest.mark.slow
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
    assert "pending            1" in product.run("status", *JOB[:2], folder=tmp_path).stdout
