"""Files of prompts: every format, and every mistake by its place."""

from __future__ import annotations

import pytest

from text2img.errors import ConfigurationError
from text2img.intake import read_prompts
from text2img.prompts import PromptId

FORMATS = {
    "a.json": '[{"id": 7, "text": "a cat", "seed": 3, "priority": 2}, {"_id": "b", "text": "a dog"}]',
    "b.json": '{"prompts":[{"id":7,"text":"a cat","seed":3,"priority":2},{"id":"b","text":"a dog"}]}',
    "a.jsonl": '{"id": 7, "text": "a cat", "seed": 3, "priority": 2}\n\n{"id": "b", "text": "a dog"}\n',
    "a.yaml": "- {id: 7, text: a cat, seed: 3, priority: 2}\n- id: b\n  text: a dog\n",
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_the_same(tmp_path, name) -> None:
    """JSON, JSON lines and YAML give the same prompts, ids of their own kind and all."""
    (tmp_path / name).write_text(FORMATS[name])
    cat, dog = read_prompts(str(tmp_path / name))
    assert (cat.id, cat.text, cat.requested.seed, cat.priority) == (PromptId("int", "7"), "a cat", 3, 2.0)
    assert (dog.id, dog.text, dog.requested.seed, dog.priority) == (PromptId("str", "b"), "a dog", None, None)


def test_csv_reads_numbers_where_they_belong(tmp_path) -> None:
    """In CSV an id is text, a parameter is a number, and an empty cell asks for nothing."""
    (tmp_path / "a.csv").write_text('id,text,width,guidance_scale,seed\n7,"a cat, sleeping",640,4.5,\n')
    (cat,) = read_prompts(str(tmp_path / "a.csv"))
    assert (cat.id, cat.text) == (PromptId("str", "7"), "a cat, sleeping")
    assert (cat.requested.width, cat.requested.guidance_scale, cat.requested.seed) == (640, 4.5, None)


def test_csv_leaves_a_name_a_name(tmp_path) -> None:
    """An artist called 007 is no number; opacity and quality are."""
    (tmp_path / "a.csv").write_text(
        "text,artist_name,signature_opacity,image_format,image_quality\na cat,007,90,webp,80\n"
    )
    (cat,) = read_prompts(str(tmp_path / "a.csv"))
    assert (cat.requested.artist_name, cat.requested.image_format) == ("007", "webp")
    assert (cat.requested.signature_opacity, cat.requested.image_quality) == (90, 80)


def test_text_is_a_prompt_a_line(tmp_path) -> None:
    """Plain text holds a prompt a line; empty lines and comments are none, repeated lines are one."""
    (tmp_path / "a.txt").write_text("\ufeffa cat\r\n\n# a comment\na dog\na cat\n")
    assert [prompt.text for prompt in read_prompts(str(tmp_path / "a.txt"))] == ["a cat", "a dog"]


def test_an_id_is_made_from_the_content(tmp_path) -> None:
    """Without an id the same content gets the same one in whatever order its fields stand."""
    (tmp_path / "a.jsonl").write_text('{"text": "a cat", "seed": 1}\n{"text": "a cat", "seed": 2}\n')
    (tmp_path / "b.jsonl").write_text('{"seed": 2, "text": "a cat"}\n{"seed": 1, "text": "a cat"}\n')
    one, other = (read_prompts(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl"))
    assert {prompt.id for prompt in one} == {prompt.id for prompt in other}
    assert len({prompt.id for prompt in one}) == 2


def test_prompt_means_text(tmp_path) -> None:
    """With either name the content, and so the id, is the same; a null counts as absent."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a cat", "seed": 7}\n{"prompt": null, "text": "a dog"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "a cat", "seed": 7}\n{"text": "a dog"}\n')
    assert list(read_prompts(str(tmp_path / "a.jsonl"))) == list(read_prompts(str(tmp_path / "b.jsonl")))


def test_fields_of_other_programs_are_named(tmp_path) -> None:
    """Each leads to the field that it is called here; a seed of −1 to none."""
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "a", "steps": 20, "cfg_scale": 7, "sampler_name": "Euler a", "tags": [], "seed": -1}\n'
        '{"prompt": "a", "text": "a"}\n'
    )
    with pytest.raises(ConfigurationError) as refused:
        read_prompts(str(tmp_path / "a.jsonl"))
    assert [line.rpartition("a.jsonl, ")[2] for line in str(refused.value).splitlines()] == [
        "line 1: unknown field 'steps'; it is called num_inference_steps here",
        "line 1: unknown field 'cfg_scale'; it is called guidance_scale here",
        "line 1: unknown field 'sampler_name'; it is called scheduler here",
        "line 1: unknown field 'tags'; it is called prompt_tags here",
        "line 1: seed must not be negative: leave it out for a seed made from the id; it is -1",
        "line 2: text and prompt are the same field; use one of them",
    ]


def test_typed_ids(tmp_path) -> None:
    """An ObjectId or UUID is written as MongoDB's extended JSON has it."""
    (tmp_path / "a.jsonl").write_text(
        '{"id": {"$oid": "507F1F77BCF86CD799439011"}, "text": "a"}\n'
        '{"id": {"$uuid": "12345678-1234-5678-9234-567812345678"}, "text": "b"}\n'
    )
    one, other = read_prompts(str(tmp_path / "a.jsonl"))
    assert one.id == PromptId("objectid", "507f1f77bcf86cd799439011")
    assert other.id == PromptId("uuid", "12345678-1234-5678-9234-567812345678")


def test_everything_that_is_wrong_is_said_at_once(tmp_path) -> None:
    """Each bad entry is named by file, line and field, with a hint where a word was misspelt."""
    (tmp_path / "a.jsonl").write_text(
        '{"text": "fine"}\n'
        '{"text": ""}\n'
        '{"text": "a", "num_inference_step": 20}\n'
        '{"text": "a", "guidance_scale": NaN}\n'
        '{"text": "a", "width": "512"}\n'
        '{"id": [1], "text": "a"}\n'
        '{"id": "x", "text": "a"}\n'
        '{"id": "x", "text": "b"}\n'
        "[]\n"
    )
    with pytest.raises(ConfigurationError) as refused:
        read_prompts(str(tmp_path / "a.jsonl"))
    lines = str(refused.value).splitlines()
    expected = [
        ("line 2", "text is empty"),
        ("line 3", "did you mean num_inference_steps?"),
        ("line 4", "guidance_scale must be a finite number"),
        ("line 5", "width must be a whole number"),
        ("line 6", "id must be"),
        ("line 8", "id x is used above already"),
        ("line 9", "must be a mapping"),
    ]
    assert len(lines) == len(expected)
    for line, (place, words) in zip(lines, expected, strict=True):
        assert f"a.jsonl, {place}: " in line
        assert words in line


def test_all_that_is_wrong_with_an_entry_is_said(tmp_path) -> None:
    """Three wrong fields of one entry are three lines, each with the entry's own line in the file."""
    (tmp_path / "a.yaml").write_text("- a cat\n- text: a dog\n  width: 7\n  seed: x\n  scheduler: dpm+\n")
    with pytest.raises(ConfigurationError) as refused:
        read_prompts(str(tmp_path / "a.yaml"))
    lines = [line.partition("a.yaml, line 2: ")[2] for line in str(refused.value).splitlines()]
    assert {line.split()[0] for line in lines} == {"width", "seed", "scheduler"}


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.json", '[\n "a",\n\n {"text":\n  ""}, {"text": ""},\n {"text": ""}]', [4, 5, 6]),
        ("a.json", '{"of": {"prompts": 1},\n "prompts": [1,\n"a", {}]}', [2, 3]),
        ("a.json", '{"prompts": [], "x": [1],\n"prompts":\n[\n7]}', [2]),
        ("a.yaml", "# c\nprompts:\n- a\n- text:\n- 7\n", [4, 5]),
        ("a.yaml", "[a,\n {text: ''}, 7]", [2, 2]),
        ("a.csv", 'id,text\na,"two\nlines"\nb,""\n,""\nc,\n', [4, 6]),
        ("a.jsonl", '\n{"text": ""}\n\n\n7\n', [2, 5]),
    ],
)
def test_what_is_wrong_is_found_by_its_line(tmp_path, name, content, lines) -> None:
    """In every format the line named is the one on which the wrong entry begins."""
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigurationError) as refused:
        read_prompts(str(tmp_path / name))
    named = [int(line.split(", line ")[1].split(":")[0]) for line in str(refused.value).splitlines()]
    assert named == lines


@pytest.mark.parametrize(
    "entry",
    [
        '{"text": "a", "status": ["pending"]}',
        '{"text": "a", "lora": {"path": "x", "weight": "heavy"}}',
        '{"text": ["a"]}',
        '{"text": "a", "prompt_tags": 7, "webhook_url": 7, "priority": "high", "dataset_id": []}',
    ],
)
def test_a_value_of_any_type_is_a_sentence(tmp_path, entry) -> None:
    """No value of another type than is wanted ends in anything but a line about it."""
    (tmp_path / "a.jsonl").write_text(entry)
    with pytest.raises(ConfigurationError, match="line 1: "):
        read_prompts(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("content", ["- &a [*a]", "- {text: a, 1: b}", "- &a {text: a, lora: *a}"])
def test_yaml_that_holds_itself_is_a_sentence(tmp_path, content) -> None:
    """Anchors may make a value hold itself, and keys may be numbers: neither is more than an error."""
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ConfigurationError, match="line 1: "):
        read_prompts(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"[1, 2", "a.json: "),
        ("a.json", b'{"text": "a"}', "must hold a list"),
        ("a.jsonl", b'{"text": "a"}\n{"text\n', "line 2 is not JSON"),
        ("a.yaml", b"- {text: a\n- b", "a.yaml, line 2"),
        ("a.yaml", b"!!python/object/apply:os.system ['true']", "a.yaml, line 1"),
        ("a.csv", b"id,text\n1,a,surplus\n", "line 2 has a different number of cells"),
        ("a.txt", b"caf\xe9\n", "is not UTF-8 text (byte 3)"),
        ("a.xlsx", b"", "must end in one of"),
        ("missing.txt", None, "No such file"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, words) -> None:
    """A file that cannot be read or parsed is one line with its name and, where there is one, its line."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError) as refused:
        read_prompts(str(tmp_path / name))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
