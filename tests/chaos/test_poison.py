"""A prompt that kills its worker: planted by killing whoever has it on the device."""

from __future__ import annotations

import pytest

from tests.chaos.counts import is_right, look
from tests.chaos.faults import finish
from tests.chaos.workers import Worker

POISON, NEIGHBOURS, AHEAD = 0, {1, 2, 3}, {4, 5, 6, 7}
SLOW = 60  # steps, so that nobody gets away alive


@pytest.fixture
def site(in_files, book):
    """A poisonous prompt that shares its batch with three others, and a batch that is claimed ahead."""
    in_files.add([each | {"num_inference_steps": SLOW} for each in book.prompts([POISON, *NEIGHBOURS])])
    in_files.add(book.prompts(AHEAD))
    return in_files


def _die_of_it(site, name):
    """A worker that dies with the poison on its device; what else was there."""
    with Worker(site, name) as worker:
        worker.reaches(lambda: POISON in site.on_device() and not site.on_device() & AHEAD)
        worker.kill()
        beside_it = site.on_device() - {POISON}
    site.end_leases("datasets")
    return beside_it


def _standing(site):
    return {each["_id"]: each for each in site.documents("datasets")}


@pytest.mark.slow
def test_a_worker_that_dies_while_it_loads_counts_nobodys_death(site):
    """Killed before its model is loaded, a worker leaves all prompts as they were."""
    before = site.documents("datasets")
    with Worker(site, "loading") as worker:
        worker.reaches(lambda: "prompts waiting" in worker.text)
        worker.kill()
        assert '"event": "loaded"' not in worker.text
    assert site.documents("datasets") == before


@pytest.mark.slow
def test_a_prompt_that_kills_its_worker_costs_no_other_prompt(site, book):
    """For two deaths its neighbours share the blame, then it runs alone, after five it is abandoned; prompts
    that were only claimed ahead are blamed for none, and all but the poison get their pictures.
    """
    assert [_die_of_it(site, f"death-{n}") for n in (1, 2)] == [NEIGHBOURS, NEIGHBOURS]
    assert [_die_of_it(site, f"death-{n}") for n in (3, 4, 5)] == [set(), set(), set()]
    standing = _standing(site)
    assert standing[POISON]["deaths"] == 4  # the fifth is counted when it is claimed next
    assert {key: standing[key]["deaths"] for key in NEIGHBOURS} == dict.fromkeys(NEIGHBOURS, 2)
    assert {standing[key]["status"] for key in AHEAD} == {"completed"}
    finish(site, status=3)
    standing = _standing(site)
    assert (standing[POISON]["status"], standing[POISON]["error_code"]) == ("error", "abandoned")
    assert {standing[key]["status"] for key in NEIGHBOURS} == {"completed"}
    for key in NEIGHBOURS:
        assert is_right(look(site.picture(key))[0], standing[key]["text"])
    for key in AHEAD:
        assert book.shows(key, site.picture(key))
