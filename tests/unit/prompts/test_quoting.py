"""Values are quoted from their beginning only, whatever their size, depth and type."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text2img.prompts.quoting import quoted


def _nested(depth):
    value: object = 7
    for _ in range(depth):
        value = [value, {"a": value}]
    return value


class _Unprintable:
    def __repr__(self):
        raise RecursionError


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (7, "7"),
        (7.5, "7.5"),
        (None, "None"),
        ("a\nb", "'a\\nb'"),
        ("\x1b[31m\u202e\x9b", "'\\x1b[31m\\u202e\\x9b'"),
        ({"a": [1, "b"]}, "{'a': [1, 'b']}"),
        ([], "[]"),
        (10**400, "a number of more than 30 digits"),
        pytest.param(-(16**5000), "a number of more than 30 digits", id="long"),
        ("x" * 10**6, "'" + "x" * 56 + "…"),
        (_Unprintable(), "a value of the type _Unprintable"),
    ],
)
def test_a_value_is_quoted_as_python_writes_it(value, shown):
    """Small values are shown whole; of the others, the beginning or the kind."""
    assert quoted(value) == shown


def test_depth_does_not_matter():
    """A value that repr() fails on, and one that would expand to 2^60 items, are quoted."""
    deep: object = []
    for _ in range(100_000):
        deep = [deep]
    assert quoted(deep) == "[[[[…]]]]"
    assert quoted(_nested(60)).startswith("[[[[…]")
    while deep:  # without recursion, which the interpreter could not end
        deep = deep[0]


@given(
    st.recursive(
        st.none() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
    )
)
def test_every_quotation_is_one_short_line(value):
    """It has at most 60 characters, all of them printable."""
    shown = quoted(value)
    assert len(shown) <= 60
    assert shown.isprintable()
