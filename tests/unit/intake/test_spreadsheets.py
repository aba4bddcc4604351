"""CSV as spreadsheets and pandas write it is read as it was meant, or refused by line and column."""

from __future__ import annotations

import codecs

import pytest

from text2img.errors import ConfigurationError
from text2img.intake import read_prompts


def read(tmp_path, content, name="a.csv"):
    """Return the file's prompts as (id, text, seed, guidance), or the lines of its refusal."""
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        return [
            (prompt.id.text, prompt.text, prompt.requested.seed, prompt.requested.guidance_scale)
            for prompt in read_prompts(str(file))
        ]
    except ConfigurationError as exc:
        return [line.replace(str(file), name) for line in str(exc).splitlines()]


LITTLE, BIG = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE
SAVE = "save it as UTF-8 (spreadsheets: CSV UTF-8)"
CAT = ("1", "a cat, sitting", 7, 7.5)


@pytest.mark.parametrize(
    "content",
    [
        'id,text,seed,guidance_scale\n1,"a cat, sitting",7,7.5\n',
        "id;text;seed;guidance_scale\r\n1;a cat, sitting;7;7,5\r\n",
        "\ufeffid;text;seed;guidance_scale\r\n1;a cat, sitting;7;7.5\r\n",
        "id\ttext\tseed\tguidance_scale\n1\ta cat, sitting\t7\t7.5\n",
        "sep=;\r\nid;text;seed;guidance_scale\r\n1;a cat, sitting;7;7,5\r\n",
        '"sep=\t"\nid\ttext\tseed\tguidance_scale\n1\ta cat, sitting\t7.0\t7.5\n',
        'SEP=,\nid, text ,seed,guidance_scale\n1,"a cat, sitting",7.00,7.5\n',
        ',id,text,seed,guidance_scale\n0,1,"a cat, sitting",7.0,7.5\n,,,,\n',
        'id,text,seed,guidance_scale,,\n,,,,,\n1,"a cat, sitting",7,7.5,,\n,,,,,,,\n;;\n\n',
        LITTLE + "id\ttext\tseed\tguidance_scale\r\n1\ta cat, sitting\t7\t7,5".encode("utf-16-le"),
        BIG + "id;prompt;seed;guidance_scale\n1;a cat, sitting;7;7,5".encode("utf-16-be"),
    ],
)  # fmt: skip
def test_one_prompt_in_many_forms(tmp_path, content) -> None:
    """Separators, a sep= line, byte order marks, 7.0, decimal commas, empty columns and rows, an index."""
    assert read(tmp_path, content) == [CAT]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("text,seed\na,7.5\n", ["a.csv, line 2: seed must be a whole number; it is 7.5"]),
        ("text,seed\na,\nb,1.2345678901234568e+18\n",
         ["a.csv, line 3: seed must be a whole number; it is '1.2345678901234568e+18'"]),
        ("text;seed\na;1.000\n", ["a.csv, line 2: seed must be a whole number; it is '1.000'"]),
        ("text,seed\na,7,5\n",
         ["a.csv: line 2 has a different number of cells than the header: 3 and 2, separated by commas"]),
        ("sep=;\nid;text\n1;a\n2\n",
         ["a.csv: line 4 has a different number of cells than the header: 1 and 2, separated by semicolons"]),
        ("text;text\na;b\n", ["a.csv: line 1: the column text occurs twice"]),
        ("text, text\na,b\n", ["a.csv: line 1: the column text occurs twice"]),
        ("text,prompt\na,b\n", ["a.csv, line 2: text and prompt are the same field; use one of them"]),
        ("text,\na,b\n", ["a.csv: line 2: column 2 has a value, but no name in the header"]),
        (",text\nx,a\n", ["a.csv: line 2: column 1 has a value, but no name in the header"]),
        ('id,text\n1,a\n2,"b\n3,c\n',
         ["a.csv: line 3: unexpected end of data; check the quotes of this row"]),
        ('sep=,\nid,text\n1,"a" b\n',
         ["a.csv: line 3: ',' expected after '\"'; check the quotes of this row"]),
        ('"id,text\n1,a\n', ["a.csv: line 1: unexpected end of data; check the quotes of this row"]),
        ('text,lora\na,"{""path"": ""x"", ""path"": ""y""}"\n', ["a.csv, line 2: path occurs twice"]),
        ("id,text\n", ["a.csv holds no prompts"]),
        ("id;text\n;\n", ["a.csv holds no prompts"]),
        (b"text\ncaf\xe9\n", [f"a.csv is not UTF-8 text (byte 8); {SAVE}"]),
        ("text\na".encode("utf-16-le"), [f"a.csv is not UTF-8 text (NUL bytes); {SAVE}"]),
        (LITTLE + b"a", [f"a.csv is not UTF-16 text (byte 2); {SAVE}"]),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(tmp_path, content, lines) -> None:
    """The line and the field or column are named."""
    assert read(tmp_path, content) == lines


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "# none\n\n"), ("a.json", "[]"), ("a.yaml", "prompts: []"), ("a.jsonl", "")],
)
def test_an_empty_file_is_refused(tmp_path, name, content) -> None:
    """A file without prompts is a mistake in every format."""
    assert read(tmp_path, content, name) == [f"{name} holds no prompts"]
