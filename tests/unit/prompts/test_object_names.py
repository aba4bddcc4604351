"""What pictures are called: the template, and the number that tells one prompt's pictures apart."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text2img.prompts import PromptId
from text2img.prompts.ids import ObjectName

KINDS = st.sampled_from(["str", "int", "objectid", "uuid", "double", "decimal128", "null", "bson", "blob"])
# Short texts of what names are made of, so that look-alikes come up; and any text at all.
ALIKE = st.text("x1029AF~.\x00\x01\x10\x19)é", max_size=6)
IDS = st.builds(PromptId, st.just("str"), ALIKE | st.text(max_size=300)) | st.builds(
    PromptId, KINDS, st.integers().map(str)
)
NUMBERS = st.integers(0, 99)
AROUND = st.text("ab1._-", max_size=4)
TEMPLATES = st.builds(lambda before, after: f"{before}{{id}}{after}", AROUND, AROUND)


def _valid(template):
    try:
        return ObjectName.parse(template)
    except ValueError:
        return None


OBJECT_NAMES = TEMPLATES.map(_valid).filter(bool)


@pytest.mark.parametrize(
    ("template", "number", "name"),
    [
        ("{id}", 0, "7"),
        ("{id}", 1, "7~1"),
        ("{id}", 9, "7~9"),
        ("{id}", 10, "7~1~0"),
        ("{id}", 99, "7~9~9"),
        ("gen_{generation_id}", 0, "gen_7"),
        ("gen_{generation_id}", 2, "gen_7~2"),
        ("2026/ink-{id}.v1", 3, "2026/ink-7.v1~3"),
    ],
)
def test_a_name_is_the_template_and_the_number(template, number, name):
    """The first picture has the plain name; each digit of a later one's number follows a tilde."""
    assert ObjectName.parse(template).of(PromptId("int", "7"), number) == name


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("image", "must contain {id}"),
        ("", "must contain {id}"),
        ("{seed}", "must contain {id}"),
        ("{id!r}", "must contain {id}"),
        ("{id}-{generation_id}", "once"),
        ("{id}-{seed}", "contain only"),
        ("{{id}}", "contain only"),
        ("{id}~1", "contain only"),
        ("ü{id}", "contain only"),
        ("a b{id}", "contain only"),
        ("{id}\n", "contain only"),
        ("/{id}", "may be empty"),
        ("a//{id}", "may be empty"),
        ("{id}/", "may be empty"),
        (".{id}", "start with a dot"),
        ("a/.{id}", "start with a dot"),
        ("../{id}", "start with a dot"),
        ("a/../{id}", "start with a dot"),
        ("a..{id}", "two dots"),
        ("x" * 41 + "{id}", "longer than 40"),
    ],
)
def test_a_template_that_cannot_be_is_refused(template, said):
    """Without the field, with others, or with what could leave or hide in the folder, it is none."""
    with pytest.raises(ValueError, match=said):
        ObjectName.parse(template)


@given(OBJECT_NAMES, IDS, NUMBERS, IDS, NUMBERS)
def test_two_pictures_never_share_a_name(names, one, first, other, second):
    """Different prompts, or pictures of one, have different names under any template."""
    same = (one, first) == (other, second)
    assert (names.of(one, first) == names.of(other, second)) == same


@given(IDS, NUMBERS)
def test_an_id_that_imitates_a_pictures_name_has_another(one, number):
    """Whatever a picture is called, an id of just that text, or one whose escapes would spell it, is not."""
    taken = ObjectName().of(one, number)
    spelt = re.sub(r"~([0-9A-F]{2})", lambda escape: chr(int(escape[1], 16)), taken)
    for imitation in (PromptId("str", taken), PromptId("str", spelt)):
        assert imitation == one or ObjectName().of(imitation) != taken


@given(OBJECT_NAMES, IDS, NUMBERS)
def test_a_name_fits_a_file_system(names, prompt_id, number):
    """With its ending it has at most 255 bytes of plain characters, and no part that hides or climbs."""
    name = f"{names.of(prompt_id, number)}.webp"
    assert re.fullmatch(r"[A-Za-z0-9._~/-]{1,255}", name)
    assert not any(part in {"", "..", "."} or part.startswith(".") for part in name.split("/"))
