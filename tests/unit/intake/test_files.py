"""Files of prompts are read entry by entry, twice: what is handed out is what was checked."""

from __future__ import annotations

import collections
import csv
import io
import json
import os
import threading
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text2img.errors import ConfigurationError
from text2img.intake import read_prompts
from text2img.intake.formats import json_entries

FEW, MANY = 100, 600
A_PROMPT = 250
"""Bytes that each prompt of a file may take; its text alone has eight times as many."""


def _rows(count):
    return [
        {"id": f"p{n}", "text": f"prompt {n}, " + "a quiet harbour, " * 120, "seed": n} for n in range(count)
    ]


def _csv(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


WRITTEN = {
    "a.json": json.dumps,
    "mapping.json": lambda rows: json.dumps({"by": "me", "prompts": rows}, indent=1),
    "a.jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "a.yaml": lambda rows: "".join("- " + json.dumps(row) + "\n" for row in rows),
    "mapping.yaml": lambda rows: "prompts:\n" + "".join("- " + json.dumps(row) + "\n" for row in rows),
    "a.csv": _csv,
    "a.txt": lambda rows: "".join(row["text"] + "\n" for row in rows),
}


def _peak(path):
    """Bytes at the most while a file is checked, and its prompts are handed out one by one."""
    tracemalloc.start()
    try:
        collections.deque(read_prompts(str(path)), maxlen=0)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", WRITTEN)
def test_memory_does_not_grow_with_the_file(tmp_path, name) -> None:
    """Six times as many prompts take no more memory than two fingerprints of each that is more."""
    file = tmp_path / name
    file.write_text(WRITTEN[name](_rows(1)))
    _peak(file)  # what is imported for this format
    file.write_text(WRITTEN[name](_rows(FEW)))
    few = _peak(file)
    file.write_text(WRITTEN[name](_rows(MANY)))
    assert _peak(file) - few < (MANY - FEW) * A_PROMPT


@pytest.mark.parametrize("name", WRITTEN)
def test_prompts_can_be_asked_for_again(tmp_path, name) -> None:
    """Whoever iterates again gets the same prompts in the same order, and each but once."""
    file = tmp_path / name
    rows = _rows(3)
    file.write_text(WRITTEN[name]([*rows, rows[1]]))
    prompts = read_prompts(str(file))
    assert [prompt.text for prompt in prompts] == [
        row["text"].strip() if ".txt" in name else row["text"] for row in rows
    ]
    assert (list(prompts), len(prompts)) == (list(prompts), 3)


@pytest.mark.parametrize(
    ("changed", "right"),
    [
        ("a\nX\nc\n", ["a"]),  # another prompt
        ("a\nb\n", ["a", "b"]),  # one is gone
        ("a\nb\nc\nd\n", ["a", "b", "c"]),  # one is new
        ("b\na\nc\n", ["a"]),  # in another order: b is passed over
        ("a\n\udcff\n", []),  # no text any more
    ],
)
def test_what_was_not_checked_is_not_handed_out(tmp_path, changed, right) -> None:
    """A file that has changed since gives prompts that were checked, and then one line that says so."""
    file = tmp_path / "a.txt"
    file.write_text("a\nb\nc\n")
    prompts = read_prompts(str(file))
    file.write_text(changed, errors="surrogateescape")
    got = []
    with pytest.raises(ConfigurationError) as refused:
        got.extend(prompt.text for prompt in prompts)
    assert got == right
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_changed_value_under_the_same_id_is_not_handed_out(tmp_path) -> None:
    """The content counts, not only the id: 7.0 for 7 says the same, 8 does not."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"id": "a", "text": "a cat", "seed": 7}')
    prompts = read_prompts(str(file))
    file.write_text('{"text": "a cat", "seed": 7.0, "id": "a"}')
    assert len(list(prompts)) == 1
    file.write_text('{"id": "a", "text": "a cat", "seed": 8}')
    with pytest.raises(ConfigurationError, match="changed after it was checked"):
        list(prompts)


def test_a_pipe_is_read_once(tmp_path) -> None:
    """What gives its text only once is kept, and read as often as a file is."""
    pipe = tmp_path / "prompts.jsonl"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"text": "a cat"}\n{"text": "a dog"}\n',))
    writer.start()
    prompts = read_prompts(str(pipe))
    writer.join()
    assert [prompt.text for prompt in prompts] == [prompt.text for prompt in prompts] == ["a cat", "a dog"]


def test_fifty_mistakes_are_shown(tmp_path) -> None:
    """Of sixty mistakes the first fifty are shown, and how many more there are."""
    file = tmp_path / "a.jsonl"
    file.write_text("7\n" * 60)
    with pytest.raises(ConfigurationError) as refused:
        read_prompts(str(file))
    lines = str(refused.value).splitlines()
    assert (len(lines), lines[49].partition(", ")[2][:8], lines[50]) == (51, "line 50:", "… and 10 more")


def test_the_byte_that_is_no_text_is_found(tmp_path) -> None:
    """It is counted from the file's start, also far into it and where it follows half a character."""
    file = tmp_path / "a.txt"
    before = "é".encode() * 70_000 + b"\xe2\x82"
    file.write_bytes(before + b"x\n")
    with pytest.raises(ConfigurationError, match=rf"is not UTF-8 text \(byte {len(before) - 2}\)"):
        read_prompts(str(file))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("- a\n---\n- b\n", "line 2: found another document"),
        ("prompts: [a]\nprompts: [b]\n", "line 2: prompts occurs twice"),
        ("x: [a]\n", "must hold a list"),
        ("", "must hold a list"),
        ("- a\n- *b\n", "line 2: found undefined alias 'b'"),
        ("- !!python/name:os.system a\n", "line 1: could not determine a constructor"),
    ],
)
def test_yaml_that_is_no_list_of_prompts(tmp_path, content, words) -> None:
    """Whatever else a YAML file may hold is one line that says what and where."""
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ConfigurationError) as refused:
        read_prompts(str(tmp_path / "a.yaml"))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [
        "- &a {text: a cat, seed: 7}\n- {<<: *a, text: a dog}\n",
        "cat: &a {text: a cat, seed: 7}\nprompts: [*a, {<<: *a, text: a dog}]\n",
        "list: &list [&a {text: a cat, seed: 7}, {<<: *a, text: a dog}]\nprompts: *list\n",
        "prompts: &list [&a {text: a cat, seed: 7}, {<<: *a, text: a dog}]\nagain: *list\n",
    ],
)
def test_yaml_names_what_stands_elsewhere(tmp_path, content) -> None:
    """An alias finds its anchor in another entry, under another key, and for the whole list."""
    (tmp_path / "a.yaml").write_text(content)
    read = [(prompt.text, prompt.requested.seed) for prompt in read_prompts(str(tmp_path / "a.yaml"))]
    assert read == [("a cat", 7), ("a dog", 7)]


class Drops(io.StringIO):
    """A text that comes in pieces of at most three characters."""

    def read(self, size: int | None = -1) -> str:
        return super().read(min(size, 3) if size else size)


_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["prompts", "a"]), inner, max_size=2)
    ),
    max_leaves=8,
)
_BLANKS = st.text(" \n\t", max_size=3)


@given(st.lists(st.tuples(_BLANKS, _VALUES), max_size=5), st.booleans(), st.booleans())
def test_json_is_read_as_a_whole_would_be(items, mapping, ascii_only) -> None:
    """In whatever pieces a text comes, its entries are those of json.loads, each with its line."""
    text, lines = ('{"a": [1,\n{}], "prompts":\n[' if mapping else "\n["), []
    for blank, value in items:
        text += ("," if lines else "") + blank
        lines.append(1 + text.count("\n"))
        text += json.dumps(value, ensure_ascii=ascii_only)
    text += ' ], "x": 0}' if mapping else "\n]"
    found = list(json_entries(Drops(text)))
    assert [line for line, _ in found] == lines
    assert [entry for _, entry in found] == [value for _, value in items]


@given(_VALUES, st.integers(0, 60), st.text('[]{},:"1e-\\ut \n', max_size=2))
def test_json_is_refused_as_a_whole_would_be(value, at, more) -> None:
    """A text is read to its end if and only if json.loads reads it as a list, or one under ``prompts``."""
    text = json.dumps(value)
    text = text[:at] + more + text[at:]
    try:
        loaded = json.loads(text)
    except ValueError:
        loaded = None
    if isinstance(loaded, dict):
        loaded = loaded.get("prompts")
    try:
        found = [entry for _, entry in json_entries(Drops(text))]
    except ValueError:
        found = None
    assert repr(found) == repr(loaded if isinstance(loaded, list) else None)


@pytest.mark.parametrize(
    "text", ["[1, 2", "", "[1]\n x", '{"a" 1}', '[1,\n {"a": tru}]', '[\n"a\nb"]', '["\\x"]']
)
def test_broken_json_is_said_as_json_says_it(text) -> None:
    """What is wrong, and its line, column and character in the whole text."""
    with pytest.raises(ValueError, match="line") as expected:
        json.loads(text)
    with pytest.raises(ValueError, match="line") as said:
        list(json_entries(Drops(text)))
    assert str(said.value) == str(expected.value)
