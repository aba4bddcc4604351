"""A prompt document's fields are converted whatever they hold: what is wrong with them fails that prompt."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from text2img.databases import Collections, Selection, open_database
from text2img.databases.documents import count_of, deaths_at_claim, number_of, prompt_of
from text2img.errors import PromptFailed
from text2img.prompts import Claim, PromptId, RequestedParameters, request
from text2img.prompts.parameters import PARAMETER_NAMES

MODEL = RequestedParameters(num_inference_steps=2, guidance_scale=7.5, width=64, height=64)
HUGE = 10**400
DEEP: list[object] = []
for _ in range(20_000):
    DEEP = [DEEP]


def prompt(**fields):
    return prompt_of(Claim(PromptId("int", "7"), "worker", 1), {"text": "a cat", **fields}, 0)


@pytest.mark.parametrize("value", [HUGE, -HUGE, float("inf"), float("nan"), DEEP, "7", True, None])
def test_a_counter_or_priority_that_is_no_number_is_zero(value) -> None:
    """The integers that no float can hold among them."""
    assert (number_of(value), count_of(value)) == (0, 0)
    assert (prompt(priority=value).priority, prompt(attempts=value).attempts) == (0, 0)
    assert deaths_at_claim({"deaths": value}) == 0


@pytest.mark.parametrize(
    "value", [HUGE, -HUGE, DEEP, {"a": DEEP}], ids=["huge", "negative", "deep", "object"]
)
@pytest.mark.parametrize("field", PARAMETER_NAMES)
def test_a_parameter_that_cannot_be_converted_fails_its_prompt(field, value) -> None:
    """The message begins with the field's name and is short."""
    with pytest.raises(PromptFailed) as failed:
        request(prompt(**{field: value}), [MODEL])
    assert str(failed.value).startswith(field)
    assert len(str(failed.value)) < 250


def test_many_long_tags_fail_their_prompt() -> None:
    """Their length is counted before they are joined."""
    with pytest.raises(PromptFailed, match="prompt_tags must not be longer than 20,000 characters"):
        request(prompt(text=None, prompt_tags=["x" * 20_000] * 100_000), [MODEL])


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ('{"path": "x", "weight": 1' + "0" * 400 + "}", "lora 1: weight"),
        ('{"path": "x", "size": 1' + "0" * 400 + "}", "lora 1: size"),
        ("[" * 900 + "]" * 900, "lora 1: must be"),
    ],
)
def test_a_rows_numbers_are_not_converted_before_they_are_checked(tmp_path, lora, words) -> None:
    """A LoRA's weight of 401 digits in a row of SQLite fails that prompt alone."""
    with closing(open_database(f"sqlite:///{tmp_path}/p.db", Collections())) as database:
        with closing(sqlite3.connect(tmp_path / "p.db")) as shell, shell:
            shell.execute("INSERT INTO datasets(_id, text, lora) VALUES ('bad', 'a cat', ?)", (lora,))
            shell.execute("INSERT INTO datasets(_id, text) VALUES ('good', 'a cat')")
        claimed = {str(each.id): each for each in database.queue.claim("worker", 2, 60, Selection())}
        assert request(claimed["good"], [MODEL]).text == "a cat"
        with pytest.raises(PromptFailed, match=words):
            request(claimed["bad"], [MODEL])
