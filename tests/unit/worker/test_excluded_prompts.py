"""Which prompts a run does not claim again, and when it gives up."""

from __future__ import annotations

import pytest

from text2img.databases import Selection
from text2img.errors import DatabaseFailed
from text2img.prompts import PromptId
from text2img.worker import leases
from text2img.worker.leases import ExcludedPrompts

ONE, TWO = PromptId("int", "1"), PromptId("int", "2")
SPRING = Selection("spring")


def test_an_unwritable_prompt_is_excluded_at_once_and_reported_once():
    """A second report of the same document, as after a lost answer, changes nothing."""
    excluded = ExcludedPrompts()
    assert excluded.apply(SPRING) is SPRING
    assert excluded.put_aside(ONE, "too large")
    assert not excluded.put_aside(ONE, "too large")
    assert excluded.apply(SPRING) == Selection("spring", exclude=frozenset({ONE}))
    excluded.check()


def test_a_prompt_that_is_lost_twice_is_excluded_and_fails_the_run():
    """Once may be an outage; what has been recorded in between resets the count."""
    excluded = ExcludedPrompts()
    excluded.lost([ONE, TWO])
    excluded.recorded([ONE])
    excluded.lost([ONE])
    assert excluded.apply(SPRING) is SPRING
    excluded.lost([TWO])
    assert excluded.apply(SPRING).exclude == {TWO}
    with pytest.raises(DatabaseFailed, match="'2'"):
        excluded.check()


def test_too_many_unwritable_prompts_are_not_their_own_fault(monkeypatch):
    """Where nearly all documents reject a write, the run ends with the reason."""
    monkeypatch.setattr(leases, "MAX_UNWRITABLE", 2)
    excluded = ExcludedPrompts()
    excluded.put_aside(ONE, "x")
    excluded.put_aside(TWO, "x")
    with pytest.raises(DatabaseFailed, match="the schema says no"):
        excluded.put_aside(PromptId("int", "3"), "the schema says no")
