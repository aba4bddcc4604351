"""A prompt's id: its file name and its seed."""

from __future__ import annotations

import json
import re
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text2img.prompts import PromptId

KINDS = st.sampled_from(["str", "int", "objectid", "uuid", "float", "object"])
IDS = st.builds(PromptId, st.just("str"), st.text(st.characters(exclude_categories=[]), max_size=400))


@pytest.mark.parametrize(
    ("kind", "text", "name"),
    [
        ("objectid", "507f1f77bcf86cd799439011", "507f1f77bcf86cd799439011"),
        ("int", "-7", "-7"),
        ("str", "spring_2026.v1-a", "spring_2026.v1-a"),
        ("str", "7", "7~str"),
        ("str", "507f1f77bcf86cd799439011", "507f1f77bcf86cd799439011~str"),
        ("str", "../../etc/passwd", "~2E.~2F..~2Fetc~2Fpasswd"),
        ("str", "a b", "a~20b"),
        ("str", "é", "~C3~A9"),
        ("str", "a~b", "a~7Eb"),
        ("str", "100%", "100~25"),
        ("str", "", "~str"),
        ("uuid", "12345678-1234-1234-1234-123456789abc", "12345678-1234-1234-1234-123456789abc~uuid"),
        ("float", "7.5", "7.5~float"),
    ],
)
def test_name_is_what_the_contract_says(kind: str, text: str, name: str) -> None:
    """An id's file name follows the documented rules to the letter."""
    assert PromptId(kind, text).name == name


@given(IDS)
def test_name_stays_inside_its_folder(prompt_id: PromptId) -> None:
    """Whatever the id, its name is a short, plain file name that cannot leave the prefix."""
    name = prompt_id.name
    assert re.fullmatch(r"[A-Za-z0-9_~-][A-Za-z0-9._~-]*", name)
    assert len(name) <= 200


@given(IDS, IDS)
def test_two_ids_never_share_a_name(one: PromptId, other: PromptId) -> None:
    """Different ids have different names, also where only the cut or a mark tells them apart."""
    assert (one == other) == (one.name == other.name)


def test_look_alikes_have_names_of_their_own() -> None:
    """Ids that are easily confused (7 and "7", a long one and the name it is cut to) are kept apart."""
    long = PromptId("str", "x" * 10_000)
    hexadecimal = "507f1f77bcf86cd799439011"
    ids = [
        PromptId("int", "7"),
        PromptId("str", "7"),
        PromptId("float", "7"),
        PromptId("str", "7~str"),
        PromptId("objectid", hexadecimal),
        PromptId("str", hexadecimal),
        PromptId("str", hexadecimal.upper()),
        long,
        PromptId("str", "x" * 10_001),
        PromptId("str", long.name),
        PromptId("str", long.name.replace("~", " ")),
    ]
    assert all(one.name != other.name for one, other in combinations(ids, 2))


def test_a_name_that_looks_cut_is_cut_itself() -> None:
    """Nobody can choose an id whose plain name is another id's cut name."""
    cut = next(
        name
        for number in range(100)
        if re.search(r"~[0-9]{2}[0-9a-f]{30}$", name := PromptId("str", f"{number}" + "x" * 500).name)
    )
    byte = bytes.fromhex(cut[168:170])
    imitation = PromptId("str", cut[:167] + byte.decode("latin-1") + cut[170:])
    assert imitation.name != cut


def test_seed_is_the_same_for_ever() -> None:
    """A seed that is derived from an id never changes: these were written down on the first day."""
    assert [PromptId("int", "7").seed, PromptId("str", "7").seed, PromptId("str", "spring").seed] == SEEDS


SEEDS = [2030201243, 580900568, 1646938445]


@pytest.mark.parametrize(
    ("prompt_id", "told"),
    [
        (PromptId("int", "500"), 500),
        (PromptId("str", "500"), "500"),
        (PromptId("int", str(-(2**63))), -(2**63)),
        (PromptId("int", str(2**63)), str(2**63)),
        (PromptId("double", "7.5"), 7.5),
        (PromptId("double", "inf"), "inf"),
        (PromptId("bool", "false"), False),
        (PromptId("null", "null"), None),
        (PromptId("objectid", "6" * 24), "6" * 24),
        (PromptId("object", '{"a": {"$numberInt": "1"}}'), '{"a": {"$numberInt": "1"}}'),
    ],
)
def test_an_id_has_its_own_type_in_json(prompt_id, told) -> None:
    """Numbers, truth values and null stay what they are; what JSON has no type for is text."""
    assert json.dumps(prompt_id.json) == json.dumps(told)
