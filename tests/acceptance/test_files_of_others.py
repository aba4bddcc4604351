"""Files as other programs write them, given to the command line: read as they are meant, or refused whole."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from tests.acceptance import product
from tests.acceptance.product import sleeping

DATABASE = ("--database", "sqlite:///prompts.db")
TWO = [("a boat", None), ("a cat, sitting", 7)]
FILES = {
    "semicolon.csv": ("\ufeffid;text;seed\r\n1;a cat, sitting;7\r\n2;a boat;\r\n;;\r\n", TWO),
    "pandas.csv": (',text,seed\n0,"a cat, sitting",7.0\n1,a boat,\n', TWO),
    "excel.csv": ("sep=\t\ntext\tseed\na cat, sitting\t7\na boat\t\n", TWO),
    "prompt.jsonl": ('{"prompt": "a cat, sitting", "seed": 7}\n{"prompt": "a boat"}\n', TWO),
    "webui.txt": ('--prompt "a cat, sitting" --seed 7\na boat\nSteps: 20, Sampler: Euler a, Seed: -1\n', TWO),
    "twice.csv": ("text,text\na,b\n", "line 1: the column text occurs twice"),
    "twice.yaml": ("- text: a cat\n  text: a dog\n", "line 1: text occurs twice (line 2)"),
    "ids.yaml": ("- id: 12:30\n  text: a clock\n", "line 1: id: YAML reads 12:30 as another number; put"),
    "quote.csv": ('id,text\n1,a\n2,"b\n', "line 3: unexpected end of data"),
    "names.jsonl": ('{"text": "a", "steps": 20}\n', "it is called num_inference_steps here"),
    "empty.json": ("[]", "holds no prompts"),
    "blank.txt": ("\u200b\n", "line 1: text is empty: it has only invisible characters"),
    "weird.txt": ("--prompt a --restore_faces true\n", "line 1: --restore_faces has no counterpart here"),
}  # fmt: skip


def _rows(folder):
    with closing(sqlite3.connect(folder / "prompts.db")) as database:
        return database.execute("SELECT text, seed FROM datasets ORDER BY text").fetchall()


def test_each_file_is_read_or_refused(tmp_path):
    """Two prompts with what they ask for; or status 2, one sentence with the file's name, and no database."""
    for name, (content, _) in FILES.items():
        (tmp_path / name).write_text(content)
    commands = [("enqueue", str(tmp_path / name), *DATABASE) for name in FILES]
    commands.append(("enqueue", str(tmp_path / "pandas.csv"), *DATABASE, "--format", "xml"))
    *finished, unknown = product.run_each(commands, tmp_path)
    assert unknown.returncode == 2
    assert "--format must be one of json, jsonl, yaml, csv, txt" in unknown.stderr
    for number, (name, done) in enumerate(zip(FILES, finished, strict=True)):
        expected, folder = FILES[name][1], tmp_path / str(number)
        if isinstance(expected, str):
            assert (done.returncode, done.stdout) == (2, ""), name
            assert f"/{name}" in done.stderr
            assert expected in done.stderr
            assert list(folder.iterdir()) == []
        else:
            assert (done.returncode, done.stdout) == (0, "added 2 of 2 prompts; 0 were there already\n"), done
            assert _rows(folder) == expected, name


@pytest.mark.parametrize(
    ("content", "flags", "outcome"),
    [
        ("id,text\n1,a cat\n2,a dog\n", (), ["a cat", "a dog"]),
        ("prompts:\n- a cat\n- text: a dog\n", (), ["a cat", "a dog"]),
        ("Photo: a cat\na dog, sitting\n", (), ["Photo: a cat", "a dog, sitting"]),
        ("[a cat]", ("--format", "TXT"), ["[a cat]"]),
        ("[a cat]", (), "standard input (read as json; --format decides): "),
    ],
)
def test_standard_input_is_read_by_its_content(tmp_path, content, flags, outcome):
    """A header, a key or a bracket never becomes a prompt, unless --format says so."""
    done = sleeping.run("enqueue", "-", *DATABASE, *flags, folder=tmp_path, stdin=content)
    if isinstance(outcome, str):
        assert done.returncode == 2
        assert outcome in done.stderr
        assert not (tmp_path / "prompts.db").exists()
    else:
        assert done.returncode == 0, done.stderr
        assert [text for text, _ in _rows(tmp_path)] == outcome


def test_syntax_of_other_programs_is_named_or_refused(tmp_path):
    """A run warns of it once, with the prompts' ids, and draws the text; with --prompt-syntax refuse the
    document fails as invalid_prompt, and a file that holds such a text is refused by line.
    """
    output = (*DATABASE, "--output", "pictures", "--model-id", str(product.MODEL))
    texts = {"a": "a (red:1.3) cat", "b": "a __colour__ dog", "c": "a (dog)", "d": "a ((bird))"}
    product.add(tmp_path, *({"id": name, "text": text} for name, text in texts.items()))
    warned = sleeping.run(*output, "--limit", "3", "--log-format", "text", folder=tmp_path)
    assert warned.stdout.startswith("completed 3"), warned.stderr
    assert warned.stderr.count("is plain text here") == 1
    assert "2 prompts have syntax of other programs" in warned.stderr
    assert "'a' ('(red:1.3)'), 'b' ('__colour__')" in warned.stderr
    failed = sleeping.run(*output, folder=tmp_path, PROMPT_SYNTAX="refuse")
    assert failed.returncode == 3, failed.stderr
    with closing(sqlite3.connect(tmp_path / "prompts.db")) as database:
        codes = database.execute("SELECT _id, error_code FROM datasets WHERE status = 'error'").fetchall()
    assert codes == [("d", "invalid_prompt")]
    (tmp_path / "a.txt").write_text("a cat\na {red|blue} dog\n")
    refused = sleeping.run("enqueue", "a.txt", *DATABASE, "--prompt-syntax", "refuse", folder=tmp_path)
    assert refused.returncode == 2
    assert "a.txt, line 2: it contains '{red|blue}'" in refused.stderr
