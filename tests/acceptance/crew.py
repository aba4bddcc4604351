"""Runs of several workers: started, with the sleeping engine unless asked otherwise, and looked at."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from contextlib import closing, contextmanager

from tests.acceptance import product

JOB = ("--database", "sqlite:///prompts.db", "--output", "pictures")


def enqueue(folder, *texts):
    rows = [{"id": number, "text": text} for number, text in enumerate(texts, 1)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert product.run("enqueue", *JOB[:2], "prompts.jsonl", folder=folder).returncode == 0


def boats(number):
    return [f"boat {each}" for each in range(number)]


@contextmanager
def running(folder, *arguments, start=product.sleeping, job=JOB, **variables):
    """The process, in a group of its own and killed at the end of the block if need be."""
    with (folder / "log").open("w") as log, subprocess.Popen(
        start.command("run", *job, *arguments),
        cwd=folder,
        env=product.environment(folder, PYTHONPATH=str(product.ROOT), **variables),
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def finished(folder, *arguments, **variables):
    """Its exit status and its line; what it logged is in the file ``log``."""
    with running(folder, *arguments, **variables) as process:
        line, _ = process.communicate()
    return process.returncode, line


def log_of(folder):
    return (folder / "log").read_text()


def rows(folder, statement):
    with closing(sqlite3.connect(folder / "prompts.db", timeout=30)) as database:
        return database.execute(statement).fetchall()


def completed(folder):
    return rows(folder, "SELECT count(*) FROM datasets WHERE status = 'completed'")[0][0]


def workers_of(folder):
    """The process ids of those that hold prompts, as their claims say them."""
    names = rows(folder, "SELECT DISTINCT claimed_by FROM datasets WHERE status = 'processing'")
    return [int(name.rsplit("-", 2)[1]) for (name,) in names]


def hold(folder):
    """Say whether any worker holds a prompt."""
    return bool(rows(folder, "SELECT 1 FROM datasets WHERE status = 'processing' LIMIT 1"))
