"""A prompt that stalls the device: what it costs itself, and what it costs the others."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from tests.acceptance import product
from tests.acceptance.product import sleeping

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
STALL = ("--stall-timeout", "1")


def _prompts(folder):
    """Return status, deaths and error code of each prompt by id."""
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        rows = database.execute("SELECT _id, status, coalesce(deaths, 0), error_code FROM datasets")
        return {key: tuple(rest) for key, *rest in rows}


def test_a_prompt_that_stalls_the_device_is_abandoned(tmp_path):
    """Each stall is a death of its batch: after two its prompts run alone, those with fewer deaths first, so
    that the others complete though the priority of the one to blame is higher; after five it is abandoned.
    """
    honest = [{"id": n, "text": product.SCENE} for n in (1, 2, 3)]
    product.add(tmp_path, {"id": 0, "text": "hang", "priority": 9}, *honest)
    seen = []
    for _ in range(5):
        assert sleeping.run(*JOB, *STALL, "--batch-size", "3", folder=tmp_path).returncode == 1
        seen.append(_prompts(tmp_path))
    assert [each[0] for each in seen] == [("pending", deaths, None) for deaths in (1, 2, 3, 4, 5)]
    beside, ahead = [each[1] for each in seen[:2]], [each[3] for each in seen[:2]]
    assert beside == [("pending", 1, None), ("pending", 2, None)]
    assert ahead == [("pending", 0, None)] * 2
    assert seen[2][3][0] == "completed"
    assert [seen[3][n][0] for n in (1, 2, 3)] == ["completed"] * 3
    assert sleeping.run(*JOB, *STALL, folder=tmp_path).returncode == 3
    assert _prompts(tmp_path)[0] == ("error", 5, "abandoned")


def test_a_stall_in_a_worker_of_several_is_that_batchs_death(tmp_path):
    """With worker processes the run goes on: the stalled worker is replaced until the prompt is abandoned."""
    product.add(tmp_path, {"id": 0, "text": "hang"}, {"id": 1, "text": product.SCENE})
    finished = sleeping.run(*JOB, *STALL, "--workers", "1", "--batch-size", "1", folder=tmp_path)
    assert finished.returncode == 3
    assert _prompts(tmp_path)[0] == ("error", 5, "abandoned")
    assert _prompts(tmp_path)[1][0] == "completed"
