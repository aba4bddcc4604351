"""A prompt remembers the input file it came from, and leaves the queue with it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.contract.database_suite import ALL, MINUTE, failed
from tests.outcomes import completed
from text2img.databases import NewPrompt, Selection, StoredPrompt
from text2img.prompts import PromptId, RequestedParameters

FILE, OTHER = (str(Path(name).absolute()) for name in ("a.txt", "b.txt"))
UNCHANGED = {"removed": False, "differs": False, "held": False, "waiting": False}


def _id(name):
    return PromptId("str", name)


def _new(name, seed=None, **fields):
    return NewPrompt(id=_id(name), text=f"a {name}", requested=RequestedParameters(seed=seed), **fields)


def _left(stand, *kept, file=FILE, **selection):
    return {
        each.text for each in stand.database.runs.left_file(file, {_id(name) for name in kept}, **selection)
    }


def test_what_left_the_file_is_told_and_removed(stand):
    """Pending prompts of this file alone: none that a worker holds, that is finished, of another file, or
    without one. A removed prompt is not claimed, and is counted.
    """
    runs = stand.database.runs
    runs.enqueue([_new(name) for name in "abcde"], FILE)
    runs.enqueue([_new("x")], OTHER)
    runs.enqueue([_new("y")])
    stand.record(completed(stand.claim(limit=1)[0]), failed(stand.claim(limit=1)[0]))
    stand.claim(limit=1)
    assert _left(stand, "d") == {"e"}
    assert _left(stand, file=OTHER) == {"x"}
    everything = [_id(name) for name in "abcdexyz"]
    assert (runs.remove(everything, FILE), runs.remove(everything, FILE), runs.remove([], FILE)) == (2, 0, 0)
    counts = runs.counts(ALL)
    assert (counts.removed, counts.pending, counts.processing, counts.completed, counts.error) == (
        2,
        2,
        1,
        1,
        1,
    )
    assert {prompt.id.text for prompt in stand.claim(limit=9)} == {"x", "y"}


def test_a_removed_prompt_comes_back_as_if_new(stand):
    """With its new content and for its new file; one that is pending keeps both."""
    runs = stand.database.runs
    runs.enqueue([_new("a"), _new("b", seed=1)], FILE)
    stand.database.queue.release([prompt.claim for prompt in stand.claim(limit=2)])
    runs.remove([_id("a")], FILE)
    assert runs.enqueue([_new("a", seed=2), _new("b", seed=2), _new("c")], OTHER) == 2
    assert {prompt.id.text: prompt.requested.seed for prompt in stand.claim(limit=9)} == {
        "a": 2, "b": 1, "c": None,
    }  # fmt: skip
    stand.database.queue.release([prompt.claim for prompt in stand.claim(limit=9)])
    stand.put({"_id": "late", "status": "removed", "text": "x", "error": "old", "attempts": 3})
    assert runs.enqueue([_new("late")], FILE) == 1
    assert stand.get("late")["text"] == "a late"
    assert not {"error", "attempts"} & {
        name for name, value in stand.get("late").items() if value is not None
    }


def test_what_is_enqueued_stays(stand):
    """Without a file a known prompt forgets its own, so that it stays when it leaves it; with one that was
    enqueued before stays as it is.
    """
    runs = stand.database.runs
    runs.enqueue([_new("a"), _new("b")], FILE)
    assert runs.enqueue([_new("a"), _new("c")]) == 1
    assert runs.enqueue([_new("c")], FILE) == 0
    runs.remove([_id("b")], FILE)
    assert _left(stand) == set()
    assert runs.enqueue([_new("b")]) == 1
    assert _left(stand) == set()


def test_a_known_prompt_may_stay_as_it_is(stand):
    """A message, which may not change a prompt, restores none and leaves its file alone."""
    runs = stand.database.runs
    runs.enqueue([_new("a"), _new("b")], FILE)
    runs.remove([_id("a")], FILE)
    before = [stand.get(name) for name in "ab"]
    assert runs.enqueue([_new("a", seed=2), _new("b", seed=2), _new("c")], restore=False) == 1
    assert [stand.get(name) for name in "ab"] == before


def test_what_left_can_be_narrowed_to_what_would_be_claimed(stand):
    """By the selection, and without what is postponed."""
    runs = stand.database.runs
    runs.enqueue([_new("a", dataset_id="spring"), _new("b", dataset_id=7), _new("c")], FILE)
    assert _left(stand, selection=ALL) == {"a", "b", "c"}
    assert _left(stand, selection=Selection("spring")) == {"a"}
    assert _left(stand, "a", selection=Selection("7")) == {"b"}


def test_new_prompts_are_compared_with_the_stored_ones(stand):
    """Each in its place, with what would happen to it; nothing is written."""
    runs = stand.database.runs
    prompts = [_new(name, seed=1, priority=2.0) for name in ("done", "held", "left", "waits")]
    runs.enqueue(prompts, FILE)
    stand.record(completed(stand.claim(limit=1)[0]))
    stand.claim(limit=1, lease=MINUTE)
    runs.remove([_id("left")], FILE)
    before = [stand.get(each.id.text) for each in prompts]
    same = runs.compare([*prompts, _new("none")], ALL)
    assert same == [
        StoredPrompt(**UNCHANGED),
        StoredPrompt(**{**UNCHANGED, "held": True}),
        StoredPrompt(**{**UNCHANGED, "removed": True}),
        StoredPrompt(**{**UNCHANGED, "waiting": True}),
        None,
    ]
    changed = runs.compare(
        [_new(each.id.text, seed=2, priority=2.0) for each in prompts], Selection("spring")
    )
    assert [(each.differs, each.waiting) for each in changed] == [(True, False)] * 4
    assert [stand.get(each.id.text) for each in prompts] == before


def test_a_database_and_its_files_can_move_together(stand, tmp_path):
    """SQLite keeps the file's path from its own folder; MongoDB, which is elsewhere, the whole path."""
    stand.database.runs.enqueue([_new("a")], FILE)
    stored = stand.get("a")["input_file"]
    if Path(stored).is_absolute():
        assert stored == FILE
    else:
        folder = stand.database.connection.path.absolute().parent
        assert Path(os.path.normpath(folder / stored)) == Path(FILE)
