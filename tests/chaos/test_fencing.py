"""A worker that sleeps through its lease: it wakes to claims that are another's, and changes nothing."""

from __future__ import annotations

import pytest

from tests.chaos.counts import count
from tests.chaos.faults import sleep_through_the_lease
from tests.chaos.workers import BATCH, pictures_made


@pytest.mark.slow
def test_a_worker_that_wakes_after_its_lease_records_nothing(over_the_wire, book):
    """Frozen with a batch on the device and another's results on their way to the database, a worker wakes
    when a second run has made all its prompts: the results arrive late and are refused, the batch too.
    """
    site = over_the_wire
    site.add(book.prompts(range(3 * BATCH)))
    written, log = sleep_through_the_lease(site)
    assert "another worker's now" in log
    assert {table: site.documents(table) for table in written} == written
    assert {each["run_id"] for each in written["dataset_records"]} == {"other"}
    counts = count(site, book, pictures_made(site))
    assert counts.faults == {}, counts
