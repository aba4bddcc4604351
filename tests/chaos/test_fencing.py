"""A worker that sleeps through its lease: it wakes to claims that are another's, and changes nothing."""

from __future__ import annotations

import pytest

from tests.chaos.counts import count
from tests.chaos.faults import sleep_through_the_lease
from tests.chaos.workers import BATCH, pictures_made


@pytest.mark.slow
def test_a_worker_that_wakes_after_its_lease_records_nothing(over_the_wire, book):
    """Frozen over its lease with results on their way and a batch on the device, a worker wakes when a
    second run has its prompts, some of them done: it ends well, and every result and prompt is the other's.
    """
    site = over_the_wire
    site.add(book.prompts(range(3 * BATCH)))
    log = sleep_through_the_lease(site)
    assert "another worker's now" in log
    for table in ("datasets", "dataset_records"):
        written = {(each["run_id"], each["claim_number"]) for each in site.documents(table)}
        assert written == {("other", 2)}
    counts = count(site, book, pictures_made(site))
    assert counts.faults == {}, counts
