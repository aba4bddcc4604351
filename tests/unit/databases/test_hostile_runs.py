"""A run's document, and a model configuration, that another program has changed cost themselves alone."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone

import pytest

from text2img.databases import Collections, Run, open_database
from text2img.databases.documents import configuration_of
from text2img.databases.run_documents import run_fields, run_of
from text2img.errors import ConfigurationError
from text2img.prompts import PromptId

DEEP: list[object] = []
for _ in range(20_000):
    DEEP = [DEEP]
EAST = timezone(timedelta(hours=23))
STARTED = datetime(2026, 11, 28, tzinfo=UTC)
HOSTILE = {
    "huge": 10**5_000,
    "infinite": float("inf"),
    "nan": float("nan"),
    "deep": DEEP,
    "object": {"a": DEEP, "": 10**400},
    "long": "x" * 1_000_000,
    "year 1": datetime.min.replace(tzinfo=EAST),
    "year 9999": datetime.max.replace(tzinfo=UTC),
    "bytes": b"\xff" * 1_000_000,
    "true": True,
}
NAMES = [*run_fields(Run(id="a", started_at=STARTED, host=""), 60), "lease_expires_at", "gpu_hour_price"]


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_a_runs_document_is_read_whatever_it_holds(value) -> None:
    """In each field alone, and in all at once: the run is there, its texts are short, its numbers finite."""
    lease = {"lease_expires_at": STARTED, "lease_seconds": 60}
    every = {"started_at": STARTED, **dict.fromkeys(set(NAMES) - {"started_at"}, value)}
    for document in ({**lease, "started_at": STARTED, name: value} for name in NAMES):
        _check(run_of("night", document))
    _check(run_of("night", every))


def _check(run):
    if run is None:  # without a start it is no run
        return
    assert run.dollars_per_1000_images is None or run.dollars_per_1000_images < 10**400
    for field in fields(run):
        value = getattr(run, field.name)
        assert not isinstance(value, str) or len(value) <= 1_000_000
        assert not isinstance(value, float | int) or abs(value) < 1.8e308
        if field.name in {"host", "status", "model", "execution"}:
            assert value is None or len(value) <= 1_000
    assert all(isinstance(spent, float | int) for spent in run.seconds.values())
    assert all(isinstance(version, str) for version in run.versions.values())


def test_documents_that_are_no_runs_do_not_hide_those_that_are(tmp_path) -> None:
    """Twenty documents of another program, which sort before the runs, are passed over."""
    with closing(open_database(f"sqlite:///{tmp_path}/p.db", Collections())) as database:
        database.runs.save_run(Run(id="night", started_at=STARTED, host="host"), 60)
        with closing(sqlite3.connect(tmp_path / "p.db")) as shell, shell:
            rows = [(f"other-{n}", "zzz") for n in range(20)]
            shell.executemany("INSERT INTO runs (_id, started_at) VALUES (?, ?)", rows)
        assert [run.id for run in database.runs.last_runs(5)] == ["night"]


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_a_model_configuration_says_in_a_short_line_what_is_wrong(value) -> None:
    """Each field, the type, the name of a field and the id: never another error than ConfigurationError."""
    fine = {"model_path", "safety_checker"}
    for name in ("model_type", "lora", "width", "scheduler", "unknown", "x" * 10**6, *fine):
        if (problem := _problem({name: value})) is None:
            assert name in fine
        else:
            assert len(problem) < 600
            assert problem.startswith("model configuration 'cc")


def _problem(document):
    try:
        configuration_of(PromptId("str", "c" * 10**6), document)
    except ConfigurationError as exc:
        return str(exc)
    return None
