"""A prompt that requests more than the operator allows fails alone, before any work."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from tests.acceptance import product

HUGE = {"width": 4096, "height": 4096, "num_inference_steps": 1000, "num_images": 100, "priority": 9}
RUN = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--num-inference-steps", "2")


@pytest.fixture
def folder(tmp_path):
    """A folder whose database has one prompt for days of work, and one for an image."""
    product.add(tmp_path, {"id": "huge", "text": "a red circle", **HUGE}, {"id": "plain", "text": "a circle"})
    return tmp_path


def test_a_prompt_beyond_the_work_fails_and_the_others_are_drawn(folder) -> None:
    """Status 3; the failed one names the limit, and the other one is completed."""
    done = product.sleeping.run("run", *RUN, folder=folder)
    assert done.returncode == 3, done.stderr
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        query = "select status, error_code, error from datasets where _id = ?"
        (huge,), (plain,) = (database.execute(query, (name,)).fetchall() for name in ("huge", "plain"))
    assert huge[:2] == ("error", "invalid_parameters")
    assert "--max-work" in huge[2]
    assert plain[0] == "completed"


def test_a_dry_run_says_so(folder) -> None:
    """The plan has only the prompt within the limits; the model's own size is not held against it."""
    plan = product.run("run", "--dry-run", *RUN, "--max-pixels", "262144", "--max-work", "60", folder=folder)
    assert plan.returncode == 0
    assert "huge would fail: width × height is 4096×4096" in plan.stdout
    assert [line for line in plan.stdout.splitlines() if "batch" in line] == [
        "  batch 1: 1 × the model's own size, 2 steps, guidance 7.5, the model's own scheduler: plain"
    ]
