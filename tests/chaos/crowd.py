"""Several workers at once, some of them killed at random moments and replaced."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import count

from tests.chaos.faults import finish
from tests.chaos.waiting import until
from tests.chaos.workers import Worker


def crowd(site, *, kills, chance, workers=4, seconds=600):
    """Work through the site's prompts; the kills are spread over the run's course.

    A worker is killed when so many prompts are completed, ``chance`` picks which, and another starts in its
    place. One more run finishes what the last of the dead have left.
    """
    waiting, names = site.count("pending"), count()
    moments = sorted(chance.randint(waiting // 20, waiting * 4 // 5) for _ in range(kills))
    with ExitStack() as alive:

        def start():
            return alive.enter_context(Worker(site, f"worker-{next(names)}"))

        crew = [start() for _ in range(workers)]
        for moment in moments:
            until(lambda moment=moment: site.count("completed") >= moment, seconds, f"{moment} are completed")
            victim = chance.choice([each for each in crew if each.busy])
            victim.kill()
            crew[crew.index(victim)] = start()
        assert [each.wait(seconds) for each in crew] == [0] * workers
    finish(site)
