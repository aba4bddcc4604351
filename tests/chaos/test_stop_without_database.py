"""A run is asked to end while its database is away."""

from __future__ import annotations

import signal

import pytest

from tests.chaos.counts import count
from tests.chaos.faults import finish
from tests.chaos.workers import BATCH, Worker, pictures_made


@pytest.mark.parametrize(
    ("silent", "number", "status"), [(False, signal.SIGTERM, 143), (True, signal.SIGINT, 130)]
)
def test_a_stop_while_the_database_is_away(over_the_wire, book, silent, number, status):
    """Asked to end while the database refuses or says nothing, a run leaves behind the calls that hang, and
    ends; what it held is free when its leases are over, and the next run makes it.
    """
    site = over_the_wire
    site.add(book.prompts(range(3 * BATCH)))
    with Worker(site, "patient", holds=2) as worker:
        worker.reaches(lambda: site.count("completed") == BATCH)
        with site.mongodb.away(silent=silent):
            site.go()
            worker.reaches(site.mongodb.missed.is_set)
            assert worker.asked_to_end(number) == status, worker.text[-3000:]
    assert "grace period" in worker.text
    assert site.count("error") == 0
    finish(site)
    assert count(site, book, pictures_made(site)).faults == {}
