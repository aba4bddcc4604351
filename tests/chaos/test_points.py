"""Two of the points beside the six steps, once each; ``python -m tests.chaos`` tries all of them."""

from __future__ import annotations

from dataclasses import fields

import pytest

from tests.chaos.counts import Counts, count
from tests.chaos.points import POINTS
from tests.chaos.table import PROMISED
from tests.chaos.workers import pictures_made


@pytest.mark.parametrize("name", ["while a LoRA is fetched, SQLite", "while a webhook is sent, SQLite"])
def test_killed_beside_the_steps_nothing_is_lost_and_nothing_is_twice(tmp_path, book, name):
    """Killed with half a LoRA fetched, a run leaves no half to be used; killed while it sends a webhook, it
    leaves that to be sent again under its id.
    """
    with POINTS[name].site(tmp_path / "site", None) as site:
        POINTS[name].attempt(site, book, 0)
        assert count(site, book, pictures_made(site)).faults == {}


def test_all_that_is_promised_is_counted():
    """What there must be none of has a count."""
    assert set(PROMISED) <= {field.name for field in fields(Counts)}
