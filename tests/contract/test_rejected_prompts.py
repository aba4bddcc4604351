"""A new prompt that the database rejects is named; the others are added."""

from __future__ import annotations

import pytest

from tests.contract.database_suite import ALL
from tests.contract.test_unwritable_documents import add_unique_index, reject
from text2img.databases import NewPrompt
from text2img.errors import ErrorCode, PromptFailed
from text2img.prompts import PromptId, RequestedParameters


def new(name, text="a cat", **fields):
    return NewPrompt(id=PromptId("str", name), text=text, requested=RequestedParameters(), **fields)


def test_a_prompt_that_the_owners_schema_rejects_is_named(stand):
    """It is not added; those beside it are, at the latest one by one."""
    reject(stand, "datasets", "NEW.text = 'forbidden'", {"text": {"$ne": "forbidden"}})
    prompts = [new("a"), new("b", "forbidden"), new("c")]
    with pytest.raises(PromptFailed, match=r"the database does not take 'b': .+") as failed:
        stand.database.runs.enqueue(prompts)
    assert failed.value.code is ErrorCode.INVALID_DOCUMENT
    for prompt in (prompts[0], prompts[2]):
        stand.database.runs.enqueue([prompt])
    assert {each.id.text for each in stand.database.queue.peek(9, ALL)} == {"a", "c"}


def test_an_index_of_the_owners_is_not_taken_for_a_known_id(stand):
    """A prompt that such an index rejects was reported as present, and was lost."""
    add_unique_index(stand, "datasets", "priority" if stand.backend.kind != "sqlite" else "number")
    assert stand.database.runs.enqueue([new("a", priority=1.0)]) == 1
    with pytest.raises(PromptFailed, match="the database does not take 'b'"):
        stand.database.runs.enqueue([new("b", priority=1.0)])
    assert stand.database.runs.enqueue([new("a", "another text", priority=2.0)]) == 0


def test_a_prompt_that_cannot_be_encoded_is_named(stand):
    """No check of files and messages lets one through; it does not spoil those that are added with it."""
    with pytest.raises(PromptFailed, match="the database does not take 'b'"):
        stand.database.runs.enqueue([new("a"), new("b", "\ud800"), new("c")])
    stand.database.runs.enqueue([new("a"), new("c")])
    assert {each.id.text for each in stand.database.queue.peek(9, ALL)} == {"a", "c"}
