"""A worker killed at each named point of its work on a SQLite file; what it leaves, the next one finishes."""

from __future__ import annotations

import pytest

from tests.chaos.counts import count
from tests.chaos.faults import FILE_FAULTS, die, finish
from tests.chaos.workers import BATCH, pictures_made


@pytest.mark.smoke
def test_killed_at_every_point_in_sqlite_nothing_is_lost_and_nothing_is_twice(in_files, book):
    """The same in a SQLite file: each kill at its point leaves nothing lost, twice, stuck, wrong or untold,
    and costs at most a batch.
    """
    for n, fault in enumerate(FILE_FAULTS):
        in_files.add(book.prompts(range(100 * n, 100 * n + 2 * BATCH)))
        die(in_files, fault, f"killed-{n}")
    finish(in_files)
    counts = count(in_files, book, pictures_made(in_files))
    assert (counts.prompts, counts.faults) == (2 * BATCH * len(FILE_FAULTS), {})
    assert BATCH <= counts.again <= BATCH * len(FILE_FAULTS)


def test_a_kill_in_the_midst_of_a_transaction_leaves_no_result_without_its_prompt(in_files, book):
    """Killed between a result and its prompt, which SQLite writes in one transaction, a worker leaves neither
    of them; the pictures are there.
    """
    in_files.add(book.prompts(range(BATCH)))
    (run_with_timeout,) = [fault for fault in FILE_FAULTS if "transaction" in fault.name]
    die(in_files, run_with_timeout, "killed", nth=2)
    assert in_files.documents("dataset_records") == []
    assert in_files.count("completed") == 0
    assert len(list((in_files.folder / "pictures").glob("*.png"))) == BATCH
