"""The database goes away in the middle of a run: for a while, and for good."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from tests.acceptance import product
from tests.chaos.counts import count
from tests.chaos.faults import finish
from tests.chaos.workers import BATCH, Worker, pictures_made

pytestmark = pytest.mark.slow
AWAY = 20  # seconds


@pytest.mark.parametrize("silent", [False, True], ids=["refusing", "silent"])
def test_a_database_that_is_away_for_a_while_is_waited_for(over_the_wire, book, silent):
    """For 20 seconds in the middle of a run the database refuses or says nothing: the run goes on, status 0,
    nothing lost, nothing twice, and no picture was made again for it.
    """
    site = over_the_wire
    site.add(book.prompts(range(5 * BATCH)))
    with Worker(site, "patient") as worker:
        worker.reaches(lambda: site.count("completed") >= BATCH)
        with site.mongodb.away(silent=silent):
            threading.Event().wait(AWAY)  # the fault itself
        assert worker.wait() == 0, worker.text[-3000:]
    assert "asking again" in worker.text
    counts = count(site, book, pictures_made(site))
    assert counts.faults == {}, counts
    assert counts.again == 0


def test_a_database_that_stays_away_ends_the_run(over_the_wire, book):
    """A database that does not come back ends the run with status 1 in bounded time; no prompt is blamed, and
    the next run makes the rest.
    """
    site = over_the_wire
    site.add(book.prompts(range(3 * BATCH)))
    with Worker(site, "patient", "--database-patience", "2") as worker:
        worker.reaches(lambda: site.count("completed") >= BATCH)
        with site.mongodb.away():
            assert worker.wait(90) == 1, worker.text[-3000:]
    assert site.count("error") == 0
    finish(site)
    assert count(site, book, pictures_made(site)).faults == {}


@pytest.mark.parametrize(
    ("silent", "number", "status"), [(False, signal.SIGTERM, 143), (True, signal.SIGINT, 130)]
)
def test_a_stop_while_the_database_is_away(over_the_wire, book, silent, number, status):
    """Asked to end while the database refuses or says nothing, a run ends within 8 s (where the cores are not
    wanted by others); what it held is free when its leases are over, and the next run makes it.
    """
    site = over_the_wire
    site.add(book.prompts(range(3 * BATCH)))
    with Worker(site, "patient") as worker:
        worker.reaches(lambda: site.count("completed") >= BATCH)
        with site.mongodb.away(silent=silent):
            worker.lives_on(1)
            asked = time.monotonic()
            assert worker.asked_to_end(number) == status, worker.text[-3000:]
            assert time.monotonic() - asked < product.soon()
    assert site.count("error") == 0
    finish(site)
    assert count(site, book, pictures_made(site)).faults == {}
