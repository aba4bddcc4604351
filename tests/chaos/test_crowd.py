"""Four workers at once on one database, some of them killed."""

from __future__ import annotations

from random import Random

from tests.chaos.counts import count
from tests.chaos.crowd import crowd
from tests.chaos.workers import BATCH, pictures_made

PROMPTS, HELD = 48, 36
"""The devices hold the last ones until the kills are over: more than two workers can claim, so that one more
still works when the second is killed.
"""


def test_four_workers_share_the_work_and_two_die(in_files, book):
    """Four workers at once, two of them killed and replaced: each prompt is made, recorded and told once."""
    in_files.add(book.prompts(range(PROMPTS)))
    in_files.add(book.prompts(range(PROMPTS, PROMPTS + HELD), "hold"))
    assert crowd(in_files, of=PROMPTS, kills=2, chance=Random(11)) == 2
    counts = count(in_files, book, pictures_made(in_files))
    assert (counts.prompts, counts.faults) == (PROMPTS + HELD, {})
    assert counts.again <= 2 * BATCH
    assert len({each["run_id"] for each in in_files.documents("datasets")}) >= 3  # nobody did it all alone
