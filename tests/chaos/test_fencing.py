"""A worker that sleeps through its lease: it wakes to claims that are another's, and changes nothing."""

from __future__ import annotations

from tests.chaos.counts import count
from tests.chaos.faults import finish, sleep_through_the_lease
from tests.chaos.workers import BATCH, Worker, pictures_made


def test_a_worker_that_wakes_after_its_lease_records_nothing(over_the_wire, book):
    """Frozen over its lease with results on their way and a batch on the device, a worker wakes when a
    second run has made its prompts: it ends well, and every result and prompt is the other's.
    """
    site = over_the_wire
    site.add(book.prompts(range(3 * BATCH)))
    log = sleep_through_the_lease(site)
    assert "lost the claim on" in log
    for table in ("datasets", "dataset_records"):
        written = {(each["run_id"], each["claim_number"]) for each in site.documents(table)}
        assert written == {("other", 2)}
    counts = count(site, book, pictures_made(site))
    assert counts.faults == {}, counts


def test_a_worker_that_wakes_after_its_lease_records_nothing_in_sqlite(in_files, book):
    """The same in a SQLite file: frozen with a batch on the device, it wakes when all is another's and done,
    and leaves all of it, and the pictures, as they are.
    """
    in_files.add(book.prompts(range(2 * BATCH)))
    with Worker(in_files, "sleeper", holds=1) as sleeper:
        sleeper.reaches(in_files.on_device)
        sleeper.freeze()
        finish(in_files, "other")
        done = {table: in_files.documents(table) for table in ("datasets", "dataset_records")}
        in_files.go()
        sleeper.thaw()
        assert sleeper.wait() == 0, sleeper.text[-3000:]
    assert "lost to other workers" in sleeper.text or "lost the claim on" in sleeper.text
    assert {table: in_files.documents(table) for table in done} == done
    assert {each["run_id"] for each in done["dataset_records"]} == {"other"}
    counts = count(in_files, book, pictures_made(in_files))
    assert counts.faults == {}, counts
