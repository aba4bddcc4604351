"""What documents hold is shown, and controls no terminal: ids, names, codes, errors, workers, runs."""

from __future__ import annotations

import os
import pty
import sqlite3
import subprocess
import unicodedata
from contextlib import closing

import pytest

from tests.acceptance import product
from text2img.databases import Collections, open_database

EVIL = "\x1b]0;owned\x07\x1b[31mFAKE\x9b2J\u202e"
SHOWN = r"\x1b]0;owned\x07\x1b[31mFAKE\x9b2J\u202e"
FORGED = "09:00:00 completed everything"
DATABASE = ("--database", "sqlite:///prompts.db")
RUN = (*DATABASE, "--output", "pictures", "--lora-source", "/x", "--log-format", "text")


@pytest.fixture
def folder(tmp_path):
    """A folder whose database is full of texts that would control a terminal."""
    with closing(open_database(f"sqlite:///{tmp_path}/prompts.db", Collections())) as database:
        database.runs.enqueue([])
    lora = f'{{"path": "/x/\x9b31m\u202e{FORGED}.safetensors", "weight": 1}}'
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database, database:
        database.executemany(
            "insert into datasets(_id, text, status, error_code, error, scheduler, lora, claimed_by,"
            " lease_expires_at) values (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (f"id{EVIL}\n{FORGED}", "", None, None, None, None, None, None, None),
                ("code", "x", "error", f"code{EVIL}\n{FORGED}", f"error{EVIL}", None, None, None, None),
                ("scheduler", "x", None, None, None, f"eule{EVIL}", None, None, None),
                ("lora", "x", None, None, None, None, lora, None, None),
                ("held", "x", "processing", None, None, None, None, f"w{EVIL}\n", "2099-01-01T00:00:00Z"),
            ],
        )
        database.execute(
            "insert into runs(_id, started_at, status, model, host, worker) values (?, ?, ?, ?, ?, ?)",
            (f"run{EVIL}\n{FORGED}", "2099-01-01T00:00:00Z", f"running{EVIL}", EVIL, EVIL, f"v{EVIL}"),
        )
    return tmp_path


def check(text: str) -> None:
    """Fail for a character that acts, and for a line that only a document's text could have begun."""
    assert not {char for char in text if unicodedata.category(char) in {"Cc", "Cf", "Zl", "Zp"}} - {"\n"}
    assert FORGED in text or SHOWN in text
    assert not [line for line in text.splitlines() if line.startswith(FORGED)]


@pytest.mark.parametrize(
    "command",
    [
        ("status", *DATABASE),
        ("status", *DATABASE, "--plot", "last"),
        ("run", "--dry-run", *RUN),
        ("doctor", *RUN, "--model-config-id", f"x{EVIL}\n{FORGED}"),
        ("retry", *DATABASE, "--error-code", f"{EVIL}\n{FORGED}"),
        ("report", *DATABASE, "--run-id", f"{EVIL}\n{FORGED}", "--log-format", "text"),
        ("compare", *DATABASE, f"{EVIL}\n{FORGED}", "b", "--log-format", "text"),
        (f"{EVIL}\n{FORGED}",),
        ("run", *RUN),
    ],
    ids=lambda command: command[0] if command[0].isalpha() else "unknown",
)
def test_commands_show_what_a_document_holds(folder, command) -> None:
    """All lines of each command, results and errors, hold the text escaped."""
    done = product.sleeping.run(*command, folder=folder)
    check(done.stdout + done.stderr)
    assert "Traceback" not in done.stderr


def on_a_terminal(folder, *command: str, until: str, **variables: str) -> str:
    """Return what the command has written to a terminal once that text was there."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        product.sleeping.command(*command), cwd=folder, stdout=theirs, stderr=theirs,
        env=product.environment(folder, **{"TERM": "xterm", "COLUMNS": "300", **variables}),
    ) as process:  # fmt: skip
        os.close(theirs)
        written = b""
        try:
            while until.encode() not in written:
                written += os.read(ours, 65_536)
        finally:
            process.kill()
            os.close(ours)
    return written.decode()


@pytest.mark.parametrize(
    ("command", "until"),
    [(("status", *DATABASE, "--watch", "0.2"), f"w{SHOWN}"), (("run", *RUN), "completed 0, failed 3")],
    ids=["watch", "run"],
)
def test_a_terminal_is_not_controlled(folder, command, until) -> None:
    """On a terminal, with its own colours and movements, the documents' sequences are escaped as well."""
    written = on_a_terminal(folder, *command, until=until)
    assert SHOWN in written
    for sequence in ("\x1b]0;owned", "\x1b[31mFAKE", "\x9b", "\u202e", f"\n{FORGED}", f"\r{FORGED}"):
        assert sequence not in written


@pytest.mark.parametrize(
    ("command", "until"),
    [(("run", *RUN), "completed 0, failed 3"), (("status", *DATABASE, "--watch", "0.2"), f"w{SHOWN}")],
    ids=["run", "watch"],
)
def test_a_dumb_terminal_gets_plain_lines(folder, command, until) -> None:
    """A terminal that cannot move its cursor: log lines in place of the bar, blocks in place of a screen."""
    written = on_a_terminal(folder, *command, until=until, TERM="dumb", COLUMNS="20")
    assert "\x1b" not in written
    if command[0] == "run":
        assert "prompts waiting: 3" in written
