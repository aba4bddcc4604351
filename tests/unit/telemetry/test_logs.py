"""Secrets and how they are kept out of everything that is written."""

from __future__ import annotations

import json
import logging

import pytest

from text2img.telemetry.logs import JsonLines, Mask, TextLines


@pytest.mark.parametrize(
    ("secret", "leak"),
    [
        ("mongodb://me:pa%40ss@host/db", "cannot reach mongodb://me:pa%40ss@host/db"),
        ("mongodb://me:pa%40ss@host/db", "authentication failed for pa@ss"),
        ("mongodb+srv://me:plain-word@host/db?replicaSet=x&tls=true", "got plain-word"),
        ("https://hooks.example/told?key=abc123", "POST /told?key=abc123 failed"),
        ("https://hooks.example/told?key=abc123|ü", "POST /told?key=abc123%7C%C3%BC failed"),
        ("whsec_c2VjcmV0", "c2VjcmV0"),
        ('quo"ted', 'token quo"ted refused'),
    ],
)
@pytest.mark.parametrize("form", [JsonLines, TextLines])
def test_no_form_of_a_secret_is_written(form, secret, leak) -> None:
    """A URL, its password (plain or encoded), its query and a token are masked in text and in JSON."""
    formatter = form(Mask([secret]), traces=True)
    record = logging.LogRecord("text2img", logging.ERROR, "x.py", 1, "%s", (leak,), None)
    line = formatter.format(record)
    assert "***" in line
    for word in ("pa%40ss", "pa@ss", "plain-word", "abc123", "c2VjcmV0", 'quo"ted', 'quo\\"ted'):
        assert word not in line


def test_a_stack_trace_is_masked_as_well() -> None:
    """What an exception says inside its trace passes the mask."""
    formatter = JsonLines(Mask(["hush-hush"]), traces=True)
    try:
        raise RuntimeError("token hush-hush")  # noqa: TRY301 - a trace is what is wanted
    except RuntimeError as exc:
        record = logging.LogRecord(
            "text2img", 40, "x.py", 1, "failed", (), (RuntimeError, exc, exc.__traceback__)
        )
    written = formatter.format(record)
    assert "RuntimeError" in json.loads(written)["stack_trace"]
    assert "hush-hush" not in written


def test_an_embedded_database_is_no_secret() -> None:
    """The path of a SQLite file may be shown."""
    assert Mask(["sqlite:///prompts.db"])("sqlite:///prompts.db") == "sqlite:///prompts.db"


@pytest.mark.parametrize("form", [JsonLines, TextLines])
def test_an_id_of_millions_of_characters_does_not_fill_the_log(form) -> None:
    """Messages and the fields of an event are cut; a secret where the cut falls is masked all the same."""
    formatter = form(Mask(["hush-hush"]), traces=True)
    name = "x" * 7_990 + "hush-hush" + "y" * 16_000_000
    record = logging.LogRecord("text2img", logging.INFO, "x.py", 1, "%s", (name,), None)
    record.prompt_id = name
    line = formatter.format(record)
    assert len(line) < 12_000
    assert "16,007,999 characters" in line
    assert "hush" not in line
