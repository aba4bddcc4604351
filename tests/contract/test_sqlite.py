"""What holds for SQLite alone: files, tables filled by hand, indexes that serve, errors in one line."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from datetime import UTC, datetime

import psutil
import pytest

from tests.contract.database_suite import ALL, opened, texts
from tests.outcomes import completed
from text2img.databases import Collections, NewPrompt, Run, open_database
from text2img.databases.sqlite.queue import EXPIRED, ORDER, PENDING
from text2img.errors import ConfigurationError, DatabaseFailed
from text2img.prompts import PromptId, RequestedParameters


def _execute(file, *statements):
    with closing(sqlite3.connect(file)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def test_prompts_can_be_inserted_in_the_shell(sqlite_stand):
    """An id and a text are enough; the other documented columns are there to be filled."""
    _execute(
        sqlite_stand.backend.file,
        "INSERT INTO datasets (_id, text) VALUES (1, 'a boat')",
        "INSERT INTO datasets (_id, text, status, width, priority) VALUES ('x', 'a ship', NULL, '512', 2)",
        "INSERT INTO datasets (_id, text, not_before) VALUES (2, 'later', datetime('now', '+1 hour'))",
        "INSERT INTO datasets (_id, text, not_before) VALUES (3, 'now', datetime('now', '-1 second'))",
        "INSERT INTO datasets (_id, text, not_before) VALUES (4, 'now', 'soon')",
    )
    prompts = sqlite_stand.claim()
    assert texts(prompts) == ["x", "1", "3", "4"]
    assert prompts[0].requested.width == "512"


def test_a_table_of_the_owners_gets_the_missing_columns(tmp_path):
    """A table with but an id and a text is taken as it is and completed."""
    file = tmp_path / "p.db"
    _execute(
        file,
        "CREATE TABLE datasets (_id INTEGER PRIMARY KEY, text TEXT, mine TEXT)",
        "INSERT INTO datasets VALUES (1, 'a boat', 'kept')",
    )
    database = opened(f"sqlite:///{file}")
    (prompt,) = database.queue.claim("w", 5, 60, ALL)
    assert database.queue.record([completed(prompt)], "r", notify=False)
    database.close()
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT mine, status FROM datasets").fetchall() == [("kept", "completed")]


def test_the_claim_uses_its_index(sqlite_stand):
    """Neither pending prompts nor expired leases are found by looking at every row, or by sorting."""
    with closing(sqlite3.connect(sqlite_stand.backend.file)) as connection:
        for condition in (PENDING, EXPIRED):
            query = f"EXPLAIN QUERY PLAN SELECT _id FROM datasets WHERE {condition} {ORDER}"  # noqa: S608
            plan = str(connection.execute(query, {"now": "x", "limit": 1}).fetchall())
            assert "USING INDEX datasets_claim" in plan
            assert "TEMP B-TREE" not in plan


@pytest.mark.parametrize("name", ["relative.db", "sub/relative.db", "with space.db", "ünï.db"])
def test_a_url_names_a_file_from_here(tmp_path, monkeypatch, name):
    """Three slashes: a path from the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    opened(f"sqlite:///{name}").close()
    assert (tmp_path / name).is_file()


@pytest.mark.parametrize(
    "url", ["sqlite:", "sqlite://", "sqlite:///", "sqlite:////", "sqlite://host/p.db", "sqlite:p.db"]
)
def test_a_url_without_a_file_is_a_configuration_error(url):
    """The sentence shows how the URL is written."""
    with pytest.raises(ConfigurationError, match=r"sqlite:///prompts\.db"):
        opened(url)


def test_memory_is_no_database_for_a_job():
    """What is in memory would end with the run."""
    with pytest.raises(ConfigurationError, match="in memory is lost at exit"):
        opened("sqlite:///:memory:")


def test_an_unknown_scheme_is_a_configuration_error():
    """The schemes that are known are named."""
    with pytest.raises(ConfigurationError, match="mongodb://"):
        opened("postgres://h/db")


def test_files_that_cannot_serve_are_said_in_one_line(tmp_path):
    """A missing folder, a folder, a text file and a read-only database each have a clear sentence."""
    text, folder = tmp_path / "notes.txt", tmp_path / "folder"
    text.write_text("these are notes, and long enough to be read as a header of a database\n" * 20)
    folder.mkdir()
    for path, said in [
        (tmp_path / "absent" / "p.db", "absent is not a folder; create it"),
        (text, "notes.txt is not a SQLite database"),
        (folder, "folder for writing"),
    ]:
        with pytest.raises(DatabaseFailed, match=said) as caught:
            opened(f"sqlite:///{path}")
        assert "\n" not in str(caught.value)


def test_a_table_that_is_none_of_ours_is_said(tmp_path):
    """A table without an id cannot hold prompts."""
    file = tmp_path / "p.db"
    _execute(file, "CREATE TABLE datasets (text TEXT)")
    with pytest.raises(DatabaseFailed, match="table datasets has no column _id; rename it"):
        opened(f"sqlite:///{file}")


def test_tables_can_be_named(tmp_path):
    """Any name that SQLite takes, also one that needs quoting; what SQLite keeps to itself is refused."""
    names = Collections(datasets='my "prompts" {1}', runs="select")
    database = opened(f"sqlite:///{tmp_path}/p.db", names)
    assert (
        database.runs.enqueue([NewPrompt(id=PromptId("int", "1"), text="x", requested=RequestedParameters())])
        == 1
    )
    assert texts(database.queue.claim("w", 1, 60, ALL)) == ["1"]
    database.close()
    with pytest.raises(ConfigurationError, match="not a valid SQLite table name"):
        opened(f"sqlite:///{tmp_path}/p.db", Collections(datasets="sqlite_master"))


def test_closed_it_opens_again_when_used(sqlite_stand):
    """Closing lets go of every thread's connection, and a later call makes its own."""
    sqlite_stand.put({"_id": 1})
    thread = threading.Thread(target=sqlite_stand.database.queue.pending, args=(ALL,))
    thread.start()
    thread.join()
    sqlite_stand.database.close()
    sqlite_stand.database.close()
    assert sqlite_stand.database.queue.pending(ALL) == 1


def test_threads_that_come_and_go_leave_no_connection_open(tmp_path):
    """However many threads have used a file and ended, it is open a few times at the most."""
    with closing(open_database(f"sqlite:///{tmp_path}/p.db", Collections())) as database:
        for _ in range(50):
            thread = threading.Thread(target=database.queue.pending, args=(ALL,))
            thread.start()
            thread.join()
        held = [file for file in psutil.Process().open_files() if file.path.endswith("/p.db")]
        assert 0 < len(held) < 5


def test_processes_that_open_a_new_file_at_once_all_get_in(tmp_path):
    """The first to come makes the tables; none of the others finds the file locked or half made."""
    program = (
        "import sys; from text2img.databases import Collections, Selection, open_database; "
        "sys.stdin.readline(); "
        f"open_database('sqlite:///{tmp_path}/p.db', Collections()).queue.pending(Selection())"
    )
    starters = [
        subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(4)
    ]
    for starter in starters:
        starter.stdin.write(b"go\n")
        starter.stdin.flush()
    assert [(starter.communicate(timeout=60)[1], starter.returncode) for starter in starters] == [
        (b"", 0)
    ] * 4


def test_a_whole_number_beyond_64_bits_is_an_id(sqlite_stand):
    """What SQLite's integers cannot hold is kept all the same."""
    new = NewPrompt(id=PromptId("int", str(2**70)), text="x", requested=RequestedParameters())
    assert sqlite_stand.database.runs.enqueue([new, new]) == 1
    assert sqlite_stand.claim_one().id == new.id


def test_without_create_a_bare_table_is_read_as_it_is(tmp_path):
    """A look at a table with but an id and a text finds its prompts and adds no column, table or file."""
    file = tmp_path / "p.db"
    _execute(file, "CREATE TABLE datasets (_id, text)", "INSERT INTO datasets VALUES (1, 'a boat')")
    before = file.read_bytes()
    database = open_database(f"sqlite:///{file}", Collections(), create=False)
    assert texts(database.queue.peek(5, ALL)) == ["1"]
    assert database.runs.model_configuration(None) is None
    with pytest.raises(DatabaseFailed):
        database.queue.claim("w", 1, 60, ALL)
    database.close()
    assert file.read_bytes() == before
    with pytest.raises(DatabaseFailed, match=r"absent\.db does not exist; create it by enqueue"):
        open_database(f"sqlite:///{tmp_path}/absent.db", Collections(), create=False)
    assert [each.name for each in tmp_path.iterdir()] == ["p.db"]


def test_a_file_of_an_older_version_is_opened_as_it_is(tmp_path):
    """Its runs lack what is kept of runs now: they are shown without, and new ones are kept whole."""
    file = tmp_path / "p.db"
    _execute(
        file,
        "CREATE TABLE runs (_id NOT NULL PRIMARY KEY, started_at, status, device_busy)",
        "INSERT INTO runs VALUES ('old', '2026-11-20T10:00:00.000Z', 'completed', 0.5)",
    )
    reading = open_database(f"sqlite:///{file}", Collections(), create=False)
    (old,) = reading.runs.last_runs(5)
    reading.close()
    assert (old.device_busy, old.device_busy_of_run, old.steady_images_per_second) == (0.5, 0, 0)
    database = opened(f"sqlite:///{file}")
    new = Run(
        id="new", started_at=datetime.now(UTC).replace(microsecond=0), host="h", device_busy_of_run=0.25
    )
    database.runs.save_run(new, 60)
    assert database.runs.run("new") == new
    assert database.runs.run("old") == old
    database.close()


def test_closing_lets_another_thread_finish_its_transaction(sqlite_stand):
    """A connection that a thread is using is not closed under its statements, which would end the process:
    the transaction is committed, the connection is closed then, and the thread's next use opens its own.
    """
    database, begun, closed, seen = sqlite_stand.database, threading.Event(), threading.Event(), []

    def work():
        with database.connection.writing() as connection:
            connection.execute("INSERT INTO datasets (_id, text) VALUES (1, 'a boat')")
            begun.set()
            closed.wait()
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")
        seen.extend(texts(database.queue.claim("w", 1, 60, ALL)))

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    database.close()
    closed.set()
    thread.join()
    assert seen == ["1"]
