"""Ids of runs, and databases that are not there: what is taken up, what is made, and what is refused."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from tests.acceptance import product
from tests.acceptance.product import SCENE, sleeping
from tests.waiting import until

DATABASE = ("--database", "sqlite:///prompts.db")
JOB = (*DATABASE, "--output", "pictures", "--model-id", str(product.MODEL))
NIGHT = ("--run-id", "night")


def _runs(folder):
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        statement = "SELECT _id, started_at, tries, status, completed FROM runs ORDER BY started_at"
        return database.execute(statement).fetchall()


def test_the_id_of_a_run_that_has_ended_is_taken_up(tmp_path):
    """``started_at`` stays and ``tries`` counts up, after one that ended and after one that was killed; while
    a live worker holds the id it is refused with status 2, before anything is added or claimed.
    """
    product.add(tmp_path, {"id": "a", "text": SCENE})
    assert sleeping.run(*JOB, *NIGHT, folder=tmp_path).returncode == 0
    ((name, began, tries, status, completed),) = _runs(tmp_path)
    assert (name, tries, status, completed) == ("night", 1, "completed", 1)
    product.add(tmp_path, {"id": "b", "text": "a boat, hold"})
    (tmp_path / "more.txt").write_text("a third prompt\n")
    with sleeping.running(*JOB, *NIGHT, folder=tmp_path) as holder:
        until(lambda: product.counts(tmp_path).get("processing"), ended=holder.poll)
        until(lambda: _runs(tmp_path)[0][3] == "running", ended=holder.poll)
        refused = sleeping.run(*JOB, *NIGHT, "--input-file", "more.txt", folder=tmp_path)
        other = sleeping.run(*JOB, "--run-id", "day", folder=tmp_path)
        holder.kill()
        holder.wait()
    assert refused.returncode == 2
    assert "the run night is in progress at" in product.errors(refused)[-1]
    assert other.returncode == 0, other.stderr
    assert product.counts(tmp_path) == {"completed": 1, "processing": 1}
    product.add(tmp_path, {"id": "c", "text": SCENE})
    assert sleeping.run(*JOB, *NIGHT, folder=tmp_path).returncode == 0
    assert _runs(tmp_path) == [("night", began, 3, "completed", 1)]


def test_a_database_that_is_not_there(tmp_path):
    """It is made by ``enqueue`` and for ``--input-file`` and ``--output-dir``; else the command is refused
    with status 2 and makes no file. ``doctor`` makes nothing in any case.
    """
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\n")
    new = ("--output", "pictures", "--model-id", str(product.MODEL))
    refused = [
        ("run", *DATABASE, *new),
        ("run", *DATABASE, *new, "--dry-run"),
        ("serve", *DATABASE, *new, "--idle-exit", "1"),
        ("status", *DATABASE),
        ("retry", *DATABASE),
        ("report", *DATABASE),
        ("doctor", *DATABASE, *new),
        ("enqueue", str(prompts), "--database", "sqlite:///no-folder/p.db"),
    ]
    doctors = [
        ("doctor", *DATABASE, *new, "--input-file", str(prompts)),
        ("doctor", "--output-dir", "out/new", "--model-id", str(product.MODEL)),
        ("run", "--output-dir", "out", "--model-id", str(product.MODEL), "--dry-run"),
    ]
    made = [("enqueue", str(prompts), *DATABASE)]
    each = product.run_each([*refused, *doctors, *made], tmp_path)
    for finished in each[: len(refused)]:
        assert finished.returncode == 2, finished
        said = finished.stdout if finished.args[0] == "doctor" else product.errors(finished)[-1]
        assert "does not exist" in said or "is not a folder" in said
    for finished in each[len(refused) : -1]:
        assert finished.returncode == 0, finished.stdout + finished.stderr
    for number in range(len(each) - 1):
        assert list((tmp_path / str(number)).iterdir()) == [], each[number].args
    assert each[-1].stdout.startswith("added 1 of 1")


def test_doctor_changes_nothing(tmp_path):
    """An owner's table of two columns is as it was, to the byte, and its folder holds nothing else."""
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.execute("CREATE TABLE datasets (_id, text)")
        database.execute("INSERT INTO datasets VALUES (1, 'a boat')")
    database = tmp_path / "prompts.db"
    before = database.read_bytes(), database.stat().st_mtime_ns
    arguments = ("doctor", "--database", f"sqlite:///{database}", *JOB[2:])
    (finished,) = product.run_each([arguments], tmp_path)
    assert finished.returncode == 0, finished.stdout
    assert "prompts waiting: 1" in finished.stdout
    assert (database.read_bytes(), database.stat().st_mtime_ns) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "prompts.db"]
    assert list((tmp_path / "0").iterdir()) == []


def test_status_counts_unknown_statuses_and_no_command_ignores_the_limit(tmp_path):
    """Documents of another program's status stand under ``other`` with their values, escaped and few;
    ``--limit`` is refused where it would mean nothing.
    """
    product.add(tmp_path, *({"id": n, "text": "a boat"} for n in range(12)))
    states = ["'done'", "'done'", "7", "char(27) || '[31m'", "x'00ff'", "1.5", "'a'", "'b'", "'c'"]
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        for number, state in enumerate(states):
            database.execute(f"UPDATE datasets SET status = {state} WHERE _id = {number}")  # noqa: S608 - ours
    named = ("--database", f"sqlite:///{tmp_path}/prompts.db")
    commands = ("status", "retry", "report")
    each = product.run_each(
        [("status", *named), *((command, *named, "--limit", "1") for command in commands)], tmp_path
    )
    (line,) = (line for line in each[0].stdout.splitlines() if line.startswith("other"))
    assert line.split()[1] == "9"
    assert "'done' 2" in line
    assert "3 more values" in line
    assert "\x1b" not in each[0].stdout
    assert each[0].stdout.startswith("pending            3")
    for command, refused in zip(commands, each[1:], strict=True):
        assert (refused.returncode, f"{command} has no option --limit" in refused.stderr) == (2, True)
