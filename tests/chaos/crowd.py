"""Several workers at once, some of them killed at random moments and replaced."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import count

from tests.chaos.faults import finish
from tests.chaos.workers import Worker
from tests.waiting import until


def crowd(site, *, kills, chance, workers=4, seconds=600):
    """Work through the site's prompts; the kills are spread over the run's course.

    A worker is killed when so many prompts are completed, ``chance`` picks which, and another starts in its
    place; one that finds everything claimed ends, and when all have, nobody is left to kill. One more run
    finishes what the last of the dead have left. Returns how many were killed.
    """
    waiting, names = site.count("pending"), count()
    moments = sorted(chance.randint(waiting // 20, waiting * 2 // 3) for _ in range(kills))
    with ExitStack() as alive:

        def start():
            return alive.enter_context(Worker(site, f"worker-{next(names)}"))

        crew = [start() for _ in range(workers)]
        killed = 0
        for moment in moments:
            until(lambda moment=moment: _due(site, crew, moment))
            if busy := [each for each in crew if each.busy]:
                victim = chance.choice(busy)
                victim.kill()
                killed += 1
                crew[crew.index(victim)] = start()
        assert [each.wait(seconds) for each in crew] == [0] * workers
    finish(site)
    return killed


def _due(site, crew, moment):
    return site.count("completed") >= moment or not any(each.lives for each in crew)
