"""A worker killed while the trained demo model draws; all other tests here have an engine that sleeps."""

from __future__ import annotations

from tests.acceptance import product
from tests.chaos.counts import Book, count, look
from tests.chaos.faults import FILE_FAULTS, finish
from tests.chaos.workers import BATCH, Worker, pictures_made


def test_what_a_killed_worker_was_drawing_is_drawn_again_as_if_nothing_had_happened(in_files, book):
    """Killed in the middle of denoising its second batch, which is to show the same as its first, a worker
    has made the first alone; the next run draws the second, and its pictures are the first one's.
    """
    first, second = book.prompts(range(BATCH)), book.prompts(range(BATCH))
    in_files.add([*first, *({**each, "_id": each["_id"] + BATCH} for each in second)])
    (denoising,) = [fault for fault in FILE_FAULTS if fault.lingers]
    with (
        denoising.catch(in_files, 2, "killed") as catch,
        Worker(in_files, "killed", engine=product.drawing) as worker,
    ):
        worker.reaches(catch.reached.is_set)
        worker.kill()
    assert pictures_made(in_files) == BATCH
    in_files.end_leases("datasets", "runs")
    finish(in_files, engine=product.drawing)
    undisturbed = [(each["text"], each["seed"], look(in_files.image(each["_id"]))[1]) for each in first]
    counts = count(in_files, Book(undisturbed), pictures_made(in_files))
    assert (counts.prompts, counts.faults, counts.again) == (2 * BATCH, {}, 0)
