"""A run that is asked to end: in good order, soon, and with nothing lost."""

from __future__ import annotations

import json
import signal
import subprocess
import time

import pytest

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
