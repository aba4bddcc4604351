"""The format of standard input follows from its content; a header or a key never becomes a prompt."""

from __future__ import annotations

import io

import pytest

from text2img.intake.files import guess_format


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"text": "a"}]', ".json"),
        ("  [broken", ".json"),
        ('{"prompts": ["a"]}', ".json"),
        ('{\n "prompts": ["a"]}', ".json"),
        ('{"prompts": [{"text": "a"}\n, "b"]}', ".json"),
        ("{red|blue} cat", ".jsonl"),
        ('\n{"text": "a"}\n{"text": "b"}', ".jsonl"),
        ('{"text": "a",}\n{"text": "b"}', ".jsonl"),
        ("- text: a\n- text: b", ".yaml"),
        ("# mine\n-\n  text: a", ".yaml"),
        ("  - {text: a}", ".yaml"),
        ("---\n- text: a", ".yaml"),
        ('- text: a\n- text: "broken', ".yaml"),
        ("- a cat\n- a dog", ".yaml"),
        ("prompts:\n- a cat", ".yaml"),
        ("usual: &usual {seed: 1}\n\n'prompts':\n- a cat", ".yaml"),
        ("id,text\n1,a", ".csv"),
        ("\ufeffid;prompt\n1;a", ".csv"),
        ('"prompt_tags"\t"seed"\n', ".csv"),
        ("sep=;\nid;text", ".csv"),
        ("Text,Seed\na,1", ".csv"),
        ("id, text\n", ".csv"),
        ("text", ".csv"),
        ("a cat, sitting\na dog", ".txt"),
        ("Photo: a house\nPhoto: a boat", ".txt"),
        ("Photo: a house\nPhoto: [a boat", ".txt"),
        ("a neon sign, text", ".txt"),
        ("- a cat\na dog", ".txt"),
        ('--prompt "a cat" --steps 20', ".txt"),
        ('"a cat"', ".txt"),
        ("", ".txt"),
    ],
)
def test_the_content_tells_the_format(text, expected) -> None:
    """Brackets are JSON, mappings and lists YAML, a header that names the text CSV; all else are lines."""
    assert guess_format(io.StringIO(text.removeprefix("\ufeff"))) == expected
