"""What a start costs: told by what it imports, since a clock would measure the machine."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
from contextlib import closing

import pytest

from tests.acceptance import product
from tests.waiting import until

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures", "--model-id", str(product.MODEL))
CAPTION = "a large red circle on a blue background"
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "pymongo",
    "google",
    "requests",
    "PIL",
    "numpy",
    "rich",
    "yaml",
}


def _imports(folder, *arguments):
    """The top-level packages that the command imports, and how it ended."""
    finished = product.run(*arguments, folder=folder, PYTHONPROFILEIMPORTTIME="1")
    names = re.findall(r"^import time: .*\| +([\w.]+)$", finished.stderr, re.MULTILINE)
    assert "text2img.cli" in names
    return {name.partition(".")[0] for name in names}, finished.returncode


def _enqueue(folder, prompts):
    rows = [{"id": n, "text": CAPTION} for n in range(prompts)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert product.run("enqueue", *JOB[:2], "prompts.jsonl", folder=folder).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "status"), [(("--help",), 0), (("run", "--help"), 0), (("--no-such",), 2), (("frob",), 2)]
)
def test_help_and_a_wrong_flag_import_next_to_nothing(tmp_path, arguments, status):
    """Neither pydantic nor logging nor any database, storage or model library."""
    imported, ended = _imports(tmp_path, *arguments)
    assert ended == status
    assert not imported & (HEAVY | {"pydantic", "pydantic_settings", "asyncio", "logging", "sqlite3", "http"})


def test_a_wrong_value_imports_what_reads_values_and_no_more(tmp_path):
    """What checks the options is there; nothing that a run would work with."""
    imported, ended = _imports(tmp_path, *JOB, "--lease-seconds", "0")
    assert (ended, "pydantic" in imported) == (2, True)
    assert not imported & (HEAVY | {"sqlite3"})


def test_a_run_with_nothing_to_do_imports_its_database_alone(tmp_path):
    """No torch, no picture library, no bucket's client, no other database's driver."""
    _enqueue(tmp_path, 1)
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute("UPDATE datasets SET status = 'completed'")
    imported, ended = _imports(tmp_path, *JOB)
    assert (ended, "sqlite3" in imported) == (0, True)
    assert not imported & HEAVY
    elsewhere, ended = _imports(tmp_path, *JOB[:2], *JOB[4:], "--gcs-bucket", "pictures")
    assert (ended, elsewhere & HEAVY) == (0, set())


def test_a_run_with_nothing_to_do_on_mongodb_imports_its_driver_alone(tmp_path, mongodb_server):
    """With an empty MongoDB it is pymongo and nothing else of what a run works with."""
    imported, ended = _imports(tmp_path, "--mongo-uri", f"{mongodb_server}/cold", *JOB[2:])
    assert (ended, imported & HEAVY) == (0, {"pymongo"})


def test_wishes_that_do_not_fit_are_found_before_the_first_claim(tmp_path):
    """Status 2; nothing was claimed, and torch was not even imported for it."""
    _enqueue(tmp_path, 1)
    imported, ended = _imports(tmp_path, *JOB, "--scheduler", "lcm", "--num-inference-steps", "51")
    assert (ended, "torch" in imported) == (2, False)
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        assert database.execute("SELECT status, claim_number FROM datasets").fetchall() == [("pending", None)]


def test_a_signal_while_the_model_loads_gives_everything_back(tmp_path):
    """The first prompts are claimed before the model is there; a signal then ends the run in good order."""
    _enqueue(tmp_path, 5)
    with product.running(*JOB, folder=tmp_path) as process:
        with closing(sqlite3.connect(tmp_path / "prompts.db", timeout=20)) as database, database:
            claimed = "SELECT count(*) FROM datasets WHERE status = 'processing'"
            until(lambda: database.execute(claimed).fetchone() != (0,), lambda: process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database:
        ends = database.execute("SELECT DISTINCT status, attempts, deaths > 0 FROM datasets").fetchall()
    assert process.returncode == 143, errors
    assert '"completed' not in errors
    assert ends == [("pending", None, 0)]
