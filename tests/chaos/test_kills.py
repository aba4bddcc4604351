"""A worker killed at each named point; what it leaves, the next ones finish and tell."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.chaos.counts import count
from tests.chaos.faults import FAULTS, die, finish
from tests.chaos.sites import wire_site, wired
from tests.chaos.workers import BATCH, pictures_made


@pytest.fixture(scope="module")
def aftermath(mongodb_server, gcs_server, book, tmp_path_factory):
    """One worker after another killed, each at another point and with two fresh batches; then one run."""
    folder = tmp_path_factory.mktemp("kills")
    with wired(mongodb_server, gcs_server) as wire, wire_site(folder, wire) as site:
        for n, fault in enumerate(FAULTS):
            site.add(book.prompts(range(100 * n, 100 * n + 2 * BATCH)))
            die(site, fault, f"killed-{n}")
        finish(site)
        yield SimpleNamespace(
            counts=count(site, book, pictures_made(site)),
            told=list(site.listener.told),
            notifications=site.documents("callbacks"),
            prompts=site.documents("datasets"),
        )


def test_killed_at_every_point_nothing_is_lost_and_nothing_is_twice(aftermath):
    """After all kills and one more run: nothing lost, twice, stuck, wrong or untold."""
    assert aftermath.counts.prompts == 2 * BATCH * len(FAULTS)
    assert aftermath.counts.faults == {}, aftermath.counts


def test_a_kill_costs_at_most_a_batch(aftermath):
    """Pictures that were made once more: at most a batch a kill, and some, or no kill had hit its mark."""
    assert 2 * BATCH <= aftermath.counts.again <= BATCH * len(FAULTS)


def test_what_was_on_its_way_to_the_receiver_is_sent_again_unchanged(aftermath):
    """The POST whose answer the kill cut off comes again, with the same webhook-id and body."""
    (cut,) = [each for each in aftermath.told if not each.answered]
    (again,) = [each for each in aftermath.told if each.answered and each.id == cut.id]
    assert again.body == cut.body
    assert len(again.says["results"]) >= 2 * BATCH


def test_what_a_dead_run_could_not_tell_is_told_in_its_name(aftermath):
    """A later run tells what a dead one had recorded and not told: with that run's id, as interrupted."""
    silent = f"killed-{[fault.name for fault in FAULTS].index('after the record, before the notice')}"
    said = [each.says for each in aftermath.told if each.says["run_id"] == silent]
    assert {each["status"] for each in said} == {"interrupted"}
    mine = {str(each["_id"]) for each in aftermath.prompts if each["run_id"] == silent}
    assert len(mine) >= 2 * BATCH
    assert {result["prompt_id"] for each in said for result in each["results"]} == mine
    assert {each["state"] for each in aftermath.notifications} == {"told"}
