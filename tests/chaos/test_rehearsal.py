"""The run that all others are compared with: nothing goes wrong in it."""

from __future__ import annotations

from tests.chaos.counts import count
from tests.chaos.faults import finish
from tests.chaos.workers import pictures_made


def test_an_undisturbed_run_makes_the_pictures_of_the_book(in_files, book):
    """Where nothing is killed, every picture is the book's, by its pixels too, and none is made again."""
    in_files.add(book.prompts(range(len(book))))
    finish(in_files, "undisturbed")
    counts = count(in_files, book, pictures_made(in_files))
    assert (counts.prompts, counts.faults, counts.again) == (len(book), {}, 0)
