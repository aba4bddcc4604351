"""A prompt that kills its worker: planted by killing whoever has it on the device."""

from __future__ import annotations

import pytest

from tests.chaos.faults import AHEAD, NEIGHBOURS, POISON, die_of_it, finish, plant_poison
from tests.chaos.workers import Worker


@pytest.fixture
def site(in_files, book):
    """With the poison planted."""
    plant_poison(in_files, book)
    return in_files


def _standing(site):
    return {each["_id"]: each for each in site.documents("datasets")}


def test_a_worker_that_dies_while_it_loads_counts_nobodys_death(site):
    """Killed before its model is loaded, a worker has claimed prompts already, and none is blamed for it."""
    with Worker(site, "loading", holds="load") as worker:
        worker.reaches(lambda: "processing" in {each["status"] for each in site.documents("datasets")})
        worker.kill()
        assert '"event": "loaded"' not in worker.text
    site.end_leases("datasets", "runs")
    die_of_it(site, "next")
    assert not any(each.get("deaths") for each in site.documents("datasets"))


def test_a_prompt_that_kills_its_worker_costs_no_other_prompt(site, book):
    """For two deaths its neighbours share the blame, then it runs alone, after five it is abandoned; prompts
    that were only claimed ahead, or had left the device and were not recorded yet, are blamed for none, and
    all but the poison get their pictures.
    """
    assert [die_of_it(site, f"death-{n}") for n in (1, 2)] == [NEIGHBOURS, NEIGHBOURS]
    assert [die_of_it(site, f"death-{n}") for n in (3, 4, 5)] == [set(), set(), set()]
    standing = _standing(site)
    assert standing[POISON]["deaths"] == 4  # the fifth is counted when it is claimed next
    assert {key: standing[key]["deaths"] for key in NEIGHBOURS} == dict.fromkeys(NEIGHBOURS, 2)
    assert {standing[key].get("deaths", 0) for key in AHEAD} == {0}
    finish(site, status=3)
    standing = _standing(site)
    assert (standing[POISON]["status"], standing[POISON]["error_code"]) == ("error", "abandoned")
    assert {standing[key]["status"] for key in NEIGHBOURS | AHEAD} == {"completed"}
    for key in NEIGHBOURS | AHEAD:
        assert book.shows(standing[key], site.image(key))
