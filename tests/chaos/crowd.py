"""Several workers at once, some of them killed at random moments and replaced."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import count

from tests.acceptance import product
from tests.chaos.faults import finish
from tests.chaos.workers import BATCH, Worker
from tests.waiting import until

WORKERS = 4


def crowd(site, *, of, kills, chance, seconds=product.HANG):
    """Work through the site's prompts; the kills are spread over the course of the first ``of`` of them.

    All begin together: each holds its first batch until the others have theirs, for which five batches a
    worker must be there. A worker is killed when so many prompts are completed, ``chance`` picks which, and
    another starts in its place; one that finds everything claimed ends, and when all have, nobody is left to
    kill. When all kills are over, the prompts that the devices hold are released. One more run finishes what
    the last of the dead have left. Returns how many were killed.
    """
    names = count()
    moments = sorted(chance.randint(of // 20, of * 2 // 3) for _ in range(kills))
    with ExitStack() as alive:

        def start():
            return alive.enter_context(Worker(site, f"worker-{next(names)}", holds=1))

        crew = [start() for _ in range(WORKERS)]
        for each in crew:
            each.reaches(lambda: len(site.on_device()) == WORKERS * BATCH)
        site.go()
        killed = 0
        for moment in moments:
            until(lambda moment=moment: _due(site, crew, moment))
            if busy := [each for each in crew if each.busy]:
                victim = chance.choice(busy)
                victim.kill()
                killed += 1
                crew[crew.index(victim)] = start()
        site.release()
        assert [each.wait(seconds) for each in crew] == [0] * WORKERS
    finish(site)
    return killed


def _due(site, crew, moment):
    return site.count("completed") >= moment or not any(each.lives for each in crew)
