"""Archive, on every database: what was made and what failed, looked through without holding it all."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.contract.database_suite import ALL, failed
from tests.outcomes import completed
from text2img.databases import Selection
from text2img.databases.sqlite.queue import selected
from text2img.databases.sqlite.run_store import _FINISHED
from text2img.databases.sqlite.session import STATUS
from text2img.errors import DatabaseFailed, ErrorCode
from text2img.prompts import Evaluation


def _names(found):
    return sorted(each.id.text for each in found)


def test_a_completed_prompt_is_there_with_all_that_was_recorded(stand):
    """Text, place, parameters, pictures with their scores, what the evaluator said, when and by which run."""
    stand.put({"_id": 7, "text": "a red boat", "dataset_id": "spring", "mine": "kept"})
    (prompt,) = stand.claim()
    urls = ("gs://b/7.png", "gs://b/7~1.png")
    judged = (Evaluation(evaluator="eye", score=0.75, missing=("boat",)), Evaluation(evaluator="eye"))
    stand.record(completed(prompt, image_url=urls[0], image_urls=urls, evaluations=judged), run_id="night")
    (made,) = stand.database.results.completed(ALL)
    assert (made.id.text, made.text, made.dataset_id, made.run_id) == ("7", "a red boat", "spring", "night")
    assert (made.image_urls, made.scores) == (urls, (0.75, None))
    assert made.used["num_inference_steps"] == 20
    assert made.used["model"] == "m"
    assert made.evaluation == {"evaluator": "eye", "score": 0.75, "missing": ["boat"]}
    assert abs(made.completed_at - datetime.now(UTC)) < timedelta(minutes=5)
    assert (made.iterations, made.tries) == (None, ())
    assert made.hashes == ("ab" * 32,)
    assert list(stand.database.results.failures(ALL)) == []


def test_a_failure_is_there_with_its_reason(stand):
    """Code, sentence, attempts and moment; what waits, is worked on or was put back is in neither."""
    stand.put({"_id": 1}, {"_id": 2}, {"_id": 3, "status": "pending"})
    one, _ = stand.claim(limit=2)
    stand.record(failed(one, ErrorCode.SAFETY), run_id="night")
    (failure,) = stand.database.results.failures(ALL)
    assert (failure.id.text, failure.text, failure.run_id) == ("1", "a boat", "night")
    assert (failure.code, failure.message, failure.attempts) == ("safety", "$it was flagged", 1)
    assert abs(failure.failed_at - datetime.now(UTC)) < timedelta(minutes=5)
    assert list(stand.database.results.completed(ALL)) == []


def test_data_set_and_run_narrow_it(stand):
    """Each alone and both together; a data set is matched as text and as the number that it reads as."""
    stand.put({"_id": 1, "dataset_id": 5}, {"_id": 2, "dataset_id": "5"}, {"_id": 3}, {"_id": 4})
    one, two, three, four = stand.claim()
    stand.record(completed(one), failed(three), run_id="a")
    stand.record(completed(two), completed(four), run_id="b")
    assert _names(stand.database.results.completed(ALL)) == ["1", "2", "4"]
    assert _names(stand.database.results.completed(Selection("5"))) == ["1", "2"]
    assert _names(stand.database.results.completed(ALL, "b")) == ["2", "4"]
    assert _names(stand.database.results.completed(Selection("5"), "b")) == ["2"]
    assert _names(stand.database.results.failures(ALL, "a")) == ["3"]
    assert _names(stand.database.results.failures(ALL, "b")) == []


def test_tries_come_as_they_were_recorded(stand):
    """A prompt that was tried several times says how often, and each try is there."""
    tries = [{"iteration": 1, "image_url": "x", "score": 0.5}, {"iteration": 2, "score": 1.0, "best": True}]
    stand.put({"_id": 1, "status": "completed", "image_url": "y", "iterations": 2, "tries": tries})
    (made,) = stand.database.results.completed(ALL)
    assert (made.iterations, list(made.tries), made.image_urls) == (2, tries, ("y",))


@pytest.mark.parametrize("odd", [7, "odd", b"\xff", 1.5])
def test_fields_of_any_other_type_stop_nothing(stand, odd):
    """What somebody else left in the job's own fields is passed over, and the other prompts are there."""
    own = ("image_url", "image_urls", "completed_at", "used", "score", "scores", "evaluation")
    more = ("iterations", "tries", "error", "error_code", "error_at", "attempts", "run_id", "dataset_id")
    for place, status in enumerate(("completed", "error")):
        stand.put({"_id": place, "status": status, **dict.fromkeys((*own, *more), odd)})
        stand.put({"_id": place + 2, "status": status, "text": odd})
    assert _names(stand.database.results.completed(ALL)) == ["0", "2"]
    assert _names(stand.database.results.failures(ALL)) == ["1", "3"]


def test_looking_through_many_takes_little_memory(stand):
    """Fifteen hundred prompts of 4 kB pass through less than a quarter of what they come to, to the last."""
    stand.put(*({"_id": n, "status": "completed", "text": f"{n:04}" * 1000} for n in range(1500)))
    tracemalloc.start()
    try:
        seen = sum(len(made.text) for made in stand.database.results.completed(ALL))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert seen == 1500 * 4000
    assert peak < seen / 4


def test_one_that_stops_looking_leaves_nothing_behind(stand):
    """An iterator that is left in the midst holds up nobody who writes, and another starts anew."""
    stand.put(*({"_id": n, "status": "completed"} for n in range(250)))
    stand.put(*({"_id": n} for n in range(250, 260)))
    looking = stand.database.results.completed(ALL)
    next(looking)
    stand.record(*(completed(prompt) for prompt in stand.claim("v")))
    del looking
    assert len(list(stand.database.results.completed(ALL))) == 260


def test_a_database_that_breaks_is_told(sqlite_stand):
    """What is no database any more when it is looked through is DatabaseFailed in one line."""
    sqlite_stand.put({"_id": 1, "status": "completed"})
    sqlite_stand.database.close()
    sqlite_stand.backend.file.write_bytes(b"no database any more, and longer than a header would be" * 100)
    with pytest.raises(DatabaseFailed, match="is not a SQLite database"):
        list(sqlite_stand.database.results.completed(ALL))


def test_sqlite_looks_by_the_index(sqlite_stand):
    """Neither all of it nor one run's is looked for through prompts of another status."""
    where, values = selected(ALL)
    statement = _FINISHED.format(datasets="datasets", status=STATUS, where=where)
    for run in (None, "night"):
        with sqlite_stand.database.connection.reading() as connection:
            plan = connection.execute(
                f"EXPLAIN QUERY PLAN {statement}", {**values, "status": "error", "run": run}
            ).fetchall()
        assert "datasets_claim" in str([tuple(row) for row in plan])


def test_scores_are_saved_later(stand):
    """In the prompt and its result, while its first image is the same one."""
    stand.put({"_id": 1}, {"_id": 2})
    stand.record(*map(completed, stand.claim()))
    first, second = sorted(stand.database.results.completed(ALL), key=lambda prompt: prompt.id.text)
    evaluation = {"evaluator": "e", "score": 0.5}
    assert stand.database.runs.save_scores(first, [0.5], evaluation)
    other = replace(second, image_urls=("gs://b/other.png",))
    assert not stand.database.runs.save_scores(other, [0.5], evaluation)
    scores = {prompt.id.text: prompt.scores for prompt in stand.database.results.completed(ALL)}
    assert scores == {"1": (0.5,), "2": ()}
    assert stand.result(1)["score"] == 0.5
    assert "score" not in stand.result(2)
