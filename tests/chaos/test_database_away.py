"""The database goes away in the middle of a run, for a while."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import pytest

from tests.chaos.counts import count
from tests.chaos.sites import wire_site, wired
from tests.chaos.workers import BATCH, Worker, pictures_made

WAYS = ["refusing", "silent"]
LEASE = ("--lease-seconds", "60")
"""The usual lease, which outlives the outage: where one ends before, its prompts may be made again."""


@pytest.fixture(scope="module")
def aftermath(mongodb_server, gcs_server, book, tmp_path_factory):
    """By the way in which the database was away, what a run came to; the two runs work side by side.

    Each has completed a batch and has its third on the device when its database goes away. That comes back
    when a call has failed twice, each time after the driver's ten seconds.
    """
    with ExitStack() as stack:
        runs = {}
        for way in WAYS:
            wire = stack.enter_context(wired(mongodb_server, gcs_server))
            site = stack.enter_context(wire_site(tmp_path_factory.mktemp(way), wire))
            site.add(book.prompts(range(5 * BATCH)))
            runs[way] = site, stack.enter_context(Worker(site, "patient", *LEASE, holds=3))
        with ExitStack() as outage:
            for way, (site, worker) in runs.items():
                worker.reaches(lambda site=site: site.count("completed") == 2 * BATCH and site.on_device())
                outage.enter_context(site.mongodb.away(silent=way == "silent"))
                site.go()
            for _, worker in runs.values():
                worker.reaches(lambda worker=worker: "retrying in 1 s" in worker.text)
        yield {
            way: SimpleNamespace(
                status=worker.wait(), log=worker.text, counts=count(site, book, pictures_made(site))
            )
            for way, (site, worker) in runs.items()
        }


@pytest.mark.parametrize("way", WAYS)
def test_a_database_that_is_away_for_a_while_is_waited_for(aftermath, way):
    """For 20 seconds in the middle of a run the database refuses or says nothing: the run goes on, status 0,
    nothing lost, nothing twice, and no picture was made again for it.
    """
    after = aftermath[way]
    assert after.status == 0, after.log[-3000:]
    assert after.counts.faults == {}, after.counts
    assert after.counts.again == 0
