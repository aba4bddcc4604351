"""The database goes away in the middle of a run, for good."""

from __future__ import annotations

from tests.chaos.counts import count
from tests.chaos.faults import finish
from tests.chaos.workers import BATCH, Worker, pictures_made


def test_a_database_that_stays_away_ends_the_run(over_the_wire, book):
    """A database that does not come back ends the run with status 1 by itself; no prompt is blamed, and the
    next run makes the rest.
    """
    site = over_the_wire
    site.add(book.prompts(range(3 * BATCH)))
    with Worker(site, "patient", "--database-patience", "2", holds=2) as worker:
        worker.reaches(lambda: site.count("completed") == BATCH)
        with site.mongodb.away():
            site.go()
            assert worker.wait() == 1, worker.text[-3000:]
    assert site.count("error") == 0
    assert site.count("completed") == BATCH
    site.end_leases("datasets", "runs")
    finish(site)
    assert count(site, book, pictures_made(site)).faults == {}
