"""What becomes of standard output that nobody reads."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.acceptance import product


@pytest.mark.parametrize("variables", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_a_reader_that_has_gone_is_no_mistake(tmp_path, variables):
    """Whoever read the output has left: no word, and the status that shells give it, buffered or not."""
    (tmp_path / "prompts.txt").write_text("a large red circle on a blue background\n")
    database = ("--database", "sqlite:///prompts.db")
    assert product.run("enqueue", *database, "prompts.txt", folder=tmp_path).returncode == 0
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as unread:
        finished = subprocess.run(
            product.command("status", *database), cwd=tmp_path,
            env=product.environment(tmp_path, **variables),
            stdout=unread, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert (finished.returncode, finished.stderr) == (141, "")
