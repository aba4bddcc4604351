"""Lines for people: nothing out of a document controls a terminal or forges a line."""

from __future__ import annotations

import json
import logging
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text2img.errors import ConfigurationError
from text2img.telemetry.logs import JsonLines, Mask, TextLines
from text2img.telemetry.terminal import (
    choose_output,
    escape,
    is_complete,
    print_error,
    print_lines,
    print_result,
    shorten,
)

ACTING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
HOSTILE = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202egnp.\n09:00:00 completed everything"
ESCAPED = r"\x1b]0;owned\x07\x1b[31mred\x9b2J\u202egnp.\n09:00:00 completed everything"


def acting(text: str) -> set[str]:
    """Return the characters of a text that act instead of being seen."""
    return {char for char in text if unicodedata.category(char) in ACTING} - {"\u200c", "\u200d"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, ESCAPED),
        ("a\tb\rc\0", r"a\tb\rc\x00"),
        ("\x7f\x80\x85\x9f", r"\x7f\x80\x85\x9f"),
        ("\u061c\u200e\u200f\u2066\u2069", r"\u061c\u200e\u200f\u2066\u2069"),
        ("\u2028\u2029\ufeff\u2060\u00ad", r"\u2028\u2029\ufeff\u2060\xad"),
        ("\U000e0041", r"\U000e0041"),
        ("\ud83d", r"\ud83d"),
        ("café — 猫 علی‌رضا 👩‍🚀\u00a0", "café — 猫 علی‌رضا 👩‍🚀\u00a0"),
        ("", ""),
    ],
)
def test_what_acts_is_escaped_and_all_else_stands(text, shown) -> None:
    """Controls, line breaks and changes of direction become escapes; letters, joiners and emoji stay."""
    assert escape(text) == shown


@given(st.text())
def test_no_text_keeps_a_character_that_acts(text) -> None:
    """Whatever the text: one line, nothing that acts, and escaped again it is the same."""
    shown = escape(text)
    assert not acting(shown)
    assert escape(shown) == shown
    shown.encode()  # no lone surrogate is left


@given(st.text(max_size=300))
def test_a_name_in_a_table_is_short(text) -> None:
    """A name takes 100 columns at most, escaped."""
    name = shorten(text)
    assert len(name) <= 100
    assert not acting(name)


def test_lines_are_printed_one_by_one(capsys) -> None:
    """The breaks between lines are ours; a break inside of one is escaped."""
    print_lines("one\ntwo", "three")
    print_error(HOSTILE)
    output = capsys.readouterr()
    assert output.out == "one\\ntwo\nthree\n"
    assert output.err == f"{ESCAPED}\n"


def formatted(form, message: str, error: Exception | None = None) -> str:
    """Return the line of a record, with a stack trace where there is an error."""
    info = None
    if error is not None:
        try:
            raise error  # noqa: TRY301 - a trace is what is wanted
        except Exception:  # noqa: BLE001
            info = sys.exc_info()
    record = logging.LogRecord("text2img", logging.WARNING, "x.py", 1, "%s failed", (message,), info)
    return form(Mask(["pass\x1bword"]), traces=True).format(record)


def test_a_log_line_as_text_is_one_line() -> None:
    """The message of a record cannot break its line, and a secret in it is masked all the same."""
    line = formatted(TextLines, f"{HOSTILE} pass\x1bword")
    assert line.endswith(f"warning: {ESCAPED} *** failed")
    assert not acting(line)


def test_an_error_of_several_lines_is_several_lines() -> None:
    """The errors of a file stand on lines of their own; each of them is escaped."""
    error = ConfigurationError("f.jsonl, line 1: a", f"f.jsonl, line 2: {HOSTILE}")
    record = logging.LogRecord(
        "text2img", logging.ERROR, "x.py", 1, "%s", (error,), (type(error), error, None)
    )
    first, second = TextLines(Mask([]), traces=False).format(record).split("\n")
    assert first.endswith(" error: f.jsonl, line 1: a")
    assert second == f"f.jsonl, line 2: {ESCAPED}"
    written = json.loads(JsonLines(Mask([]), traces=False).format(record))["message"]
    assert written == f"f.jsonl, line 1: a\nf.jsonl, line 2: {HOSTILE}"


def test_a_stack_trace_as_text_cannot_forge_a_line() -> None:
    """Each of its lines is indented and escaped, those of the exception's own message as well."""
    first, *trace = formatted(TextLines, "x", RuntimeError(HOSTILE)).split("\n")
    assert first.endswith("warning: x failed")
    assert any("09:00:00 completed everything" in line for line in trace)
    assert all(line.startswith("    ") and not acting(line) for line in trace)


def test_a_log_line_as_json_is_ascii() -> None:
    """C1 and changes of direction are escaped as JSON does, and read back as they were."""
    line = formatted(JsonLines, HOSTILE, RuntimeError(HOSTILE))
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["message"] == f"{HOSTILE} failed"


def test_a_stack_in_the_record_s_fields_is_shown() -> None:
    """The stacks of a device that hangs, and a worker's trace, follow their line as text."""
    record = logging.LogRecord("text2img", logging.ERROR, "x.py", 1, "it hangs", (), None)
    record.stack_trace = "File one\nFile two\x1b[31m"
    lines = TextLines(Mask([]), traces=False).format(record).split("\n")
    assert lines[1:] == ["    File one", r"    File two\x1b[31m"]


def test_standard_output_carries_one_document(capsys):
    """With JSON, lines for people are left out, and nothing follows the result; ``more`` lets more follow."""
    try:
        choose_output(json=True)
        print_lines("for people")
        print_result({"number": float("nan"), "text": "\ud83d"}, more=True)
        assert not is_complete()
        print_result({"status": 0})
        print_result({"error": "the clean-up failed", "status": 1})
        assert is_complete()
    finally:
        choose_output(json=False)
    assert capsys.readouterr().out == '{"number": null, "text": "\\\\ud83d"}\n{"status": 0}\n'
    print_result({"status": 0})
    print_lines("for people")
    assert capsys.readouterr().out == "for people\n"
