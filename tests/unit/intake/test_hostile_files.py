"""A file's bad entry is its own line of the error, in time and memory that do not depend on the entry."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from text2img.errors import ConfigurationError
from text2img.intake import read_prompts
from text2img.intake.entries import new_prompt

HUGE = "1" + "0" * 400
NUMBERS = (
    *("seed", "num_inference_steps", "guidance_scale", "width", "height", "num_images"),
    *("signature_opacity", "image_quality", "priority"),
)


def refusal(tmp_path, name, content):
    """Return the error's lines for a file that is refused, without the file's name."""
    file = tmp_path / name
    file.write_text(content, errors="surrogatepass")
    with pytest.raises(ConfigurationError) as refused:
        read_prompts(str(file))
    return [line.removeprefix(str(file)).lstrip(":, ") for line in str(refused.value).splitlines()]


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("number", [HUGE, f"-{HUGE}", "9" * 5_000], ids=["positive", "negative", "long"])
def test_a_number_beyond_every_type_is_its_fields_error(tmp_path, field, number) -> None:
    """A number that no float can hold, or that Python would not convert, is refused by line and field."""
    lines = refusal(tmp_path, "a.jsonl", f'{{"text": "a cat"}}\n{{"text": "a dog", "{field}": {number}}}\n')
    assert len(lines) == 1
    assert lines[0].startswith(f"line 2: {field} must be ")
    assert lines[0].endswith("it is a number of more than 30 digits")


def test_a_loras_huge_weight_is_its_error(tmp_path) -> None:
    """The weight is named, not converted."""
    entry = f'{{"text": "a cat", "lora": [{{"path": "x", "weight": {HUGE}}}]}}'
    lines = refusal(tmp_path, "a.jsonl", entry)
    assert lines == ["line 1: lora 1: weight must be a finite number between -10 and 10"]


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ("0x" + "f" * 5_000, "seed"),
        ("1" + ":1" * 3_000 + ".5", "guidance_scale"),
    ],
)
def test_yaml_has_more_notations_for_huge_numbers(tmp_path, value, field) -> None:
    """Hexadecimal and sexagesimal numbers are bounded as well."""
    (line,) = refusal(tmp_path, "a.yaml", f"- {{text: a cat, {field}: {value}}}\n")
    assert line.startswith(f"line 1: {field} must be ")


@pytest.mark.parametrize(
    "field", [*NUMBERS, "text", "prompt_tags", "scheduler", "status", "id", "lora", "style_id", "webhook_url"]
)
def test_a_deep_value_is_its_fields_error(field) -> None:
    """A value that repr() cannot show is refused by its field's name, in one short line."""
    deep: object = []
    for _ in range(20_000):
        deep = [deep]
    prompt, errors = new_prompt({"text": "a cat", field: deep})
    assert prompt is None
    assert [error.split()[0] for error in errors] == [field]
    assert len(errors[0]) < 200


DEEP = "[" * 9_000 + "]" * 9_000
STAIRS = "\n".join(" " * n + "-" for n in range(300))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.jsonl", '"a"\n{"text": ' + DEEP + '}\n{"text": ""}\n', "line 2: is nested too deeply"),
        ("a.json", '["a",\n' + DEEP + "]", "a value is nested too deeply: line 2 column 1"),
        ("a.yaml", "- a\n- " + DEEP, "line 2: a value is nested too deeply"),
        ("a.yaml", "- a\n" + STAIRS, "line 53: a value is nested too deeply"),
    ],
)
def test_what_is_too_deep_to_read_is_named(tmp_path, name, content, line) -> None:
    """Nesting that no parser of Python's takes has a line too."""
    assert refusal(tmp_path, name, content)[0].startswith(line)


BOMB = "x0: &x0 [a, a, a, a, a, a, a, a, a, a]\n" + "".join(
    f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
MERGE_BOMB = "x0: &x0 {seed: 1}\n" + "".join(
    f"x{n}: &x{n} {{<<: [{', '.join([f'*x{n - 1}'] * 10)}]}}\n" for n in range(1, 11)
)
LONG_LIST = f"x: &x [{', '.join(['a'] * 9_000)}]\n"


@pytest.mark.parametrize(
    ("content", "errors"),
    [
        (BOMB + "prompts:\n- {text: a cat, width: *x8}\n", ["line 5: aliases expand to too many values"]),
        (MERGE_BOMB + "prompts:\n- {text: a cat, <<: *x10}\n", ["line 6: aliases expand to too many values"]),
        (
            LONG_LIST + "prompts:\n" + "- {text: a cat, width: *x}\n" * 1_000,
            ["line 64: aliases expand to too many values"],
        ),
        (
            LONG_LIST + "prompts:\n- {text: a, width: [*x, *x, *x]}\n",
            ["line 3: contains more than 25,000 values"],
        ),
        (
            f"x: &x {'x' * 20_000}\nprompts:\n- prompt_tags: [{', '.join(['*x'] * 10_000)}]\n",
            ["line 3: prompt_tags must not be longer than 20,000 characters; it has 200,009,999"],
        ),
        ("- &a {text: a cat, lora: *a}\n", ["line 1: a value contains itself"]),
        ("- &a {text: a cat, <<: *a}\n", ["line 1: a value contains itself"]),
    ],
)  # fmt: skip
def test_aliases_are_counted_before_they_are_expanded(tmp_path, content, errors) -> None:
    """A small file whose aliases or merges stand for millions of values is refused in little memory."""
    refusal(tmp_path, "import.yaml", "- 7\n")  # so that no import is measured
    tracemalloc.start()
    try:
        assert refusal(tmp_path, "a.yaml", content) == errors
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


def test_honest_aliases_are_unlimited(tmp_path) -> None:
    """Thousands of entries may share one set of parameters, of which each entry overrides some."""
    tags = ", ".join(["a"] * 50)
    file = tmp_path / "a.yaml"
    file.write_text(
        f"usual: &usual {{width: 512, height: 768, prompt_tags: [{tags}], lora: &lora [{{path: x}}]}}\n"
        "prompts:\n"
        + "".join(f"- {{<<: *usual, seed: {n}, width: 640, lora: *lora}}\n" for n in range(2_000))
    )
    prompts = list(read_prompts(str(file)))
    assert [prompt.requested.seed for prompt in prompts] == list(range(2_000))
    assert {prompt.requested.width for prompt in prompts} == {640}
    assert {prompt.requested.height for prompt in prompts} == {768}


@pytest.mark.parametrize(
    ("name", "content", "errors"),
    [
        ("a.yaml", "- text: a cat\n  text: a dog\n  seed: 1\n  seed: 2\n- 7\n",
         ["line 1: text occurs twice (line 2)", "line 1: seed occurs twice (line 4)", "line 5: must be a"]),
        ("a.yaml", "- {text: a cat, lora: {path: x,\n  path: y}}\n", ["line 1: path occurs twice (line 2)"]),
        ("a.yaml", "- &a {text: a}\n- {<<: *a, seed: 1,\n   <<: *a}\n", ["line 2: '<<' occurs twice"]),
        ("a.yaml", "x: {a: 1,\n a: 2}\nprompts: [a]\n", ["line 2: a occurs twice"]),
        ("a.yaml", "x: 1\nprompts: [a]\nx: 2\n", ["line 3: x occurs twice"]),
        ("a.jsonl", '"a"\n{"text": "a", "seed": 1, "seed": 2}\n7\n',
         ["line 2: seed occurs twice", "line 3: must be a mapping"]),
        ("a.json", '[{"text": "a"},\n {"text": "b", "lora": [{"path": "x", "path": "x"}]}, 7]',
         ["line 2: path occurs twice", "line 2: must be a mapping"]),
        ("a.json", '{"prompts": ["a"],\n"prompts": ["b"]}', ["line 2: prompts occurs twice"]),
        ("a.json", '{"x": {"a": 1, "a": 2}, "prompts": ["a"]}', ["line 1: a occurs twice"]),
        ("a.json", '["a", {"te\\u0078t": "a", "text": "b"}]', ["line 1: text occurs twice"]),
        ("a.json", '[{"a\\u001b": 1, "a\\u001b": 2}]', ["line 1: 'a\\x1b' occurs twice"]),
        ("a.csv", "text,seed,text\na,1,b\n", ["line 1: the column text occurs twice"]),
    ],
)  # fmt: skip
def test_a_key_that_occurs_twice_is_refused(tmp_path, name, content, errors) -> None:
    """No value is dropped silently: the line and the key are named, and the next entry is read."""
    lines = refusal(tmp_path, name, content)
    assert len(lines) == len(errors)
    for line, error in zip(lines, errors, strict=True):
        assert line.startswith(error)


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ("id: 12:30", "id: YAML reads 12:30 as another number; put the id in quotes"),
        ("id: 010", "id: YAML reads 010 as another number; put the id in quotes"),
        ("_id: 1_000", "_id: YAML reads 1_000 as another number; put the id in quotes"),
        ("id: 0x1F", "id: YAML reads 0x1F as another number; put the id in quotes"),
        ("id: +7", "id: YAML reads +7 as another number; put the id in quotes"),
        ("id: 1.10", "id: YAML reads 1.10 as a number; put the id in quotes"),
        ("id: 2024-05-01", "id: YAML reads 2024-05-01 as a date; put the id in quotes"),
        ("id: no", "id: YAML reads no as true or false; put the id in quotes"),
        ("dataset_id: 0b11", "dataset_id: YAML reads 0b11 as another number; put it in quotes"),
        ("negative_prompt: off", "negative_prompt: YAML reads off as true or false; put it in quotes"),
        ("seed: 010", "seed: YAML reads 010 as another number; write a decimal number"),
        ("width: 8:32", "width: YAML reads 8:32 as another number; write a decimal number"),
        ("<<: *usual", "style_id: YAML reads 012 as another number; put it in quotes"),
        ("<<: [*usual]", "style_id: YAML reads 012 as another number; put it in quotes"),
    ],
)
@pytest.mark.parametrize("name", ["", "&all "])
def test_yaml_that_reads_another_value_is_refused(tmp_path, entry, error, name) -> None:
    """A plain value that YAML takes for another number, a date or a truth value is named, with its line."""
    content = f"usual: &usual {{style_id: 012}}\nprompts: {name}\n- {{text: a cat, {entry}}}\n- a dog\n"
    assert refusal(tmp_path, "a.yaml", content) == [f"line 3: {error}"]


def test_yaml_that_reads_the_same_value_is_read(tmp_path) -> None:
    """Quoted values, decimal numbers, and a ratio, which YAML takes for minutes."""
    file = tmp_path / "a.yaml"
    file.write_text(
        "- {id: '010', text: a, aspect_ratio: 16:9, seed: 0x1F}\n- {id: -7, text: 'no', seed: 1_0}\n"
    )
    one, other = read_prompts(str(file))
    assert (one.id.text, one.requested.aspect_ratio, one.requested.seed) == ("010", "16:9", 31)
    assert (other.id.text, other.text, other.requested.seed) == ("-7", "no", 10)


@pytest.mark.parametrize(
    "value", ["2001-99-99", "!!bool x", "!!timestamp x", "!!int x", '!!int ""', "!!float x", "!!timestamp {}"]
)
def test_a_value_that_yaml_cannot_construct_is_its_entrys_error(tmp_path, value) -> None:
    """Dates that do not exist and wrong tags have a line."""
    first = refusal(tmp_path, "a.yaml", f'- a\n- {{text: a, seed: {value}}}\n- ""\n')[0]
    assert first.startswith("line 2: ")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (
            "text\na\n" + "x" * 200_000 + "\n",
            "line 3: field larger than field limit (131072); check the quotes of this row",
        ),
        ('text\na\n"b\n', "line 3: unexpected end of data; check the quotes of this row"),
    ],
)
def test_csv_that_cannot_be_parsed_has_a_line(tmp_path, content, error) -> None:
    """The line is the one on which the row begins."""
    assert refusal(tmp_path, "a.csv", content) == [error]


@pytest.mark.parametrize("name", ["a.jsonl", "a.yaml"])
def test_many_unknown_fields_are_counted(tmp_path, name) -> None:
    """Ten are named; a suggestion for each of thousands would take minutes."""
    lines = refusal(
        tmp_path, name, ("- " if name == "a.yaml" else "") + json.dumps(dict.fromkeys(map(str, range(5_000))))
    )
    assert lines[10:] == ["line 1: 4,990 more unknown fields", "line 1: text is missing; describe the image"]


def test_an_id_is_text_that_a_database_can_store(tmp_path) -> None:
    """A lone surrogate cannot be encoded."""
    (line,) = refusal(tmp_path, "a.jsonl", '{"id": "a\\ud800", "text": "a cat"}')
    assert line == "line 1: id contains a lone surrogate; write plain Unicode"


@pytest.mark.parametrize(
    ("name", "content"), [("a.yaml", "- !<%s> x\n"), ("b.yaml", "- *%s\n"), ("c.yaml", "- {text: a, %s: 1}")]
)
def test_an_error_of_the_parser_is_short(tmp_path, name, content) -> None:
    """What a file contains reaches the message only in part."""
    (line,) = refusal(tmp_path, name, content % ("x" * 1_000))
    assert line.startswith("line 1: ")
    assert len(line) < 400


_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(300, 6_000).map(lambda digits: 10**digits),
    st.floats(),
    st.text(max_size=20),
)
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_KEYS = st.sampled_from(
    [*NUMBERS, "id", "text", "lora", "prompt_tags", "status", "scheduler", "webhook_url", "x"]
)
_PAIRS = st.lists(st.tuples(_KEYS, _VALUES), max_size=4)


def _dumps(value):
    """Encode as JSON, integers of any length too."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(name)}: {_dumps(member)}' for name, member in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_dumps, value))}]"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10**300:
        return "1" + "0" * 300 + "0" * (value.bit_length() // 4)
    return json.dumps(value)


_BAD_JSON = st.one_of(
    _PAIRS.map(
        lambda pairs: f"{{{', '.join(f'{json.dumps(key)}: {_dumps(value)}' for key, value in pairs)}}}"
    ),
    _VALUES.map(_dumps),
    st.integers(1, 3_000).map(lambda depth: '{"text": ' + "[" * depth + "]" * depth + "}"),
)


def _honest():
    return [json.dumps({"id": f"honest-{n}", "text": "a cat"}) for n in range(3)]


def _read(file):
    """Return the ids of a file's prompts and no errors, or none and the errors without the file's name."""
    try:
        return [str(prompt.id) for prompt in read_prompts(str(file))], []
    except ConfigurationError as exc:
        lines = ("\n" + str(exc)).split(f"\n{file}")
        return [], [line.lstrip(":, ") for line in lines[1:]] if not lines[0] else [str(exc)]


def _check_one_bad(file, bad_line):
    """Check that the file is read with its honest entries, or that only the bad one's line is named."""
    found, errors = _read(file)
    assert all(f"line {bad_line}" in error for error in errors), errors
    honest = [name for name in found if name.startswith("honest-")]
    assert errors or honest == ["honest-0", "honest-1", "honest-2"]


@given(bad=_BAD_JSON, place=st.integers(0, 3))
def test_one_bad_line_of_json(tmp_path_factory, bad, place) -> None:
    """One arbitrary line among honest ones costs only itself: every error is on that line."""
    lines = _honest()
    lines.insert(place, bad)
    file = tmp_path_factory.getbasetemp() / "one-bad.jsonl"
    file.write_text("\n".join(lines))
    _check_one_bad(file, place + 1)


@given(bad=_BAD_JSON, place=st.integers(0, 3), mapping=st.booleans())
def test_one_bad_entry_of_json(tmp_path_factory, bad, place, mapping) -> None:
    """The same in a list, which goes on behind it."""
    lines = _honest()
    lines.insert(place, bad)
    file = tmp_path_factory.getbasetemp() / "one-bad.json"
    file.write_text(('{"prompts": [' if mapping else "[") + ",\n".join(lines) + ("]}" if mapping else "]"))
    _check_one_bad(file, place + 1)


_ESCAPED = st.text(st.sampled_from("[]{},:&*!|>-?#%@`'\"<a1x. \n\t~"), max_size=30)


@given(bad=_BAD_JSON | _ESCAPED, place=st.integers(0, 3))
@example(bad="&a [*a, *a]", place=0)
@example(bad="{text: !!python/name:os.system x}", place=2)
def test_one_bad_entry_of_yaml(tmp_path_factory, bad, place) -> None:
    """Whatever stands in a YAML entry, the file is read or refused in lines with the file's name."""
    lines = [f"- {line}" for line in _honest()]
    lines.insert(place, f"- {bad}")
    file = tmp_path_factory.getbasetemp() / "one-bad.yaml"
    file.write_text("\n".join(lines))
    found, errors = _read(file)
    assert found or errors
    assert all(len(error) < 400 for error in errors)


@given(document=_VALUES)
def test_any_yaml_document(tmp_path_factory, document) -> None:
    """A document of any shape is read or refused in lines."""
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    try:
        file.write_text(yaml.safe_dump(document))
    except ValueError:  # it has more digits than Python writes
        return
    _, errors = _read(file)
    assert not any(str(file) in error for error in errors)


@given(
    cells=st.lists(st.text(st.characters(codec="utf-8"), max_size=30) | st.just(HUGE), min_size=4, max_size=4)
)
def test_one_bad_row(tmp_path_factory, cells) -> None:
    """A row of any cells is read or refused in lines."""
    file = tmp_path_factory.getbasetemp() / "one-bad.csv"
    row = ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)
    file.write_text(f"id,text,seed,lora\ncat,a cat,,\n{row}\ndog,a dog,,\n", newline="")
    found, errors = _read(file)
    assert all(error.startswith("line 3") for error in errors), errors
    assert errors or {"cat", "dog"} <= set(found)
