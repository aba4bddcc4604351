"""What a run says of its cost, when it is told what an hour of its machine costs."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing

import pytest

from tests.acceptance import product
from tests.acceptance.product import sleeping

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
PRICE = 3.6  # dollars: a tenth of a cent a second


def test_a_run_says_what_1000_images_cost(tmp_path):
    """Two prompts of two pictures each and one that fails: seconds × price ÷ four pictures, the same in the
    last line, in the run's document and in status; a run that makes nothing says nothing.
    """
    product.add(tmp_path, product.SCENE, "a large green square on a white background")
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute("INSERT INTO datasets (_id, text) VALUES (1, '')")
    quick = ("--num-images", "2", "--gpu-hour-price", str(PRICE))
    first = sleeping.run("run", *JOB, *quick, folder=tmp_path)
    assert first.returncode == 3, first.stderr
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database:
        price, cost, seconds = database.execute(
            "SELECT gpu_hour_price, dollars_per_1000_images, "
            "(julianday(finished_at) - julianday(started_at)) * 86400 FROM runs"
        ).fetchone()
    assert price == PRICE
    assert cost == pytest.approx(seconds * PRICE / 3600 / 4 * 1000, abs=0.001)
    said = re.compile(r"\$(\d+\.\d+) per 1,000 images")
    for text in (first.stdout, product.run("status", *JOB[:2], folder=tmp_path).stdout):
        assert float(said.search(text)[1]) == pytest.approx(cost, abs=0.005)
    again = product.run("run", *JOB, *quick, folder=tmp_path)
    assert again.stdout.startswith("completed 0, ")
    assert "$" not in again.stdout


def test_a_price_that_is_none_is_refused(tmp_path):
    """A price must be a number from 0 on: status 2, and a line that names the option."""
    prices = [f"--gpu-hour-price={price}" for price in ("-1", "nan", "inf", "cheap")]
    for refused in product.run_each([("run", *JOB, price) for price in prices], tmp_path):
        assert refused.returncode == 2
        assert "--gpu-hour-price (GPU_HOUR_PRICE)" in refused.stderr
