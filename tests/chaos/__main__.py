"""The long form: as many kills at each point as asked for, and tables of what they came to.

``python -m tests.chaos --kills 20``. The workers' engine sleeps and paints. A second table has the longest
time that a run took to end when it was asked to, in each of several states, beside its target.

Every try is kept as a line in .chaos/tries.jsonl as soon as it is over, and one that stands there is not made
again: what was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random

from tests.chaos.counts import count
from tests.chaos.crowd import crowd
from tests.chaos.faults import (
    DEADLY,
    FAULTS,
    FILE_FAULTS,
    POISON,
    die,
    die_of_it,
    die_with_pictures_waiting,
    finish,
    plant_poison,
    sleep_through_the_lease,
)
from tests.chaos.rehearsal import rehearse
from tests.chaos.sites import file_site, wire_site, wired
from tests.chaos.stops import IDLE, SIGNALS, STATES, TARGET, is_late, stop
from tests.chaos.table import PROMISED, table, table_of_stops
from tests.chaos.workers import BATCH, pictures_made
from tests.servers.gcs import gcs_in
from tests.servers.mongodb import mongodb_in

POISONED = "a prompt that kills its worker, SQLite"
KEPT = Path(__file__).parents[2] / ".chaos" / "tries.jsonl"


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Kill workers at named points, ask runs to end, and count what is left.",
        epilog="Exit status 1: something was lost, twice, stuck, wrong or untold, or a run that was asked to "
        f"end took over {TARGET:g} s although the cores were less than {IDLE:.0%} busy in the second before. "
        "On busier cores its seconds are only printed, with how busy the cores were.",
    )
    parser.add_argument("--kills", type=int, default=20, help="at each point, and stops in each state")
    parser.add_argument("--crowd", type=int, nargs=2, default=(1000, 300), help="prompts: SQLite, MongoDB")
    arguments = parser.parse_args()
    KEPT.parent.mkdir(exist_ok=True)
    with _servers() as site_in:
        for fault, number, attempt in _tries(arguments.kills, *arguments.crowd):
            if (fault, number) not in {(each["fault"], each["number"]) for each in _kept()}:
                with site_in(fault) as (site, book):
                    figures = attempt(site, book, number)
                    poison = {POISON} if fault == POISONED else set()
                    counts = asdict(count(site, book, pictures_made(site), poison))
                _keep({"fault": fault, "number": number, **figures, **counts})
    sys.stdout.write(table(_kept()) + "\n" + table_of_stops(_kept()))
    return int(any(is_late(each) or any(each[name] for name in PROMISED) for each in _kept()))


def _tries(kills, in_sqlite, in_mongodb):
    """Every try: its fault, its number, and what does it on a site and returns its figures (``kills``)."""
    for number in range(kills):
        for fault in (*FAULTS, *FILE_FAULTS):
            yield fault.name, number, _one_dies(fault)
        yield "while the storage hangs", number, _one_dies_waiting
        yield "frozen beyond its lease", number, _one_sleeps
        for state in STATES:
            yield state.name, number, _one_stops(state)
        if number % DEADLY == 0:
            yield POISONED, number, _poisoned
    yield f"4 workers, {in_sqlite} prompts, SQLite", kills, _crowded(in_sqlite, kills)
    yield f"4 workers, {in_mongodb} prompts, MongoDB", kills, _crowded(in_mongodb, kills)


def _one_dies(fault):
    def attempt(site, book, number):
        chance = Random(number)
        site.add(book.prompts(range(3 * BATCH)))
        die(site, fault, "killed", 1 + number % fault.times, chance.uniform(0, 0.4) * fault.lingers)
        finish(site)
        return {"kills": 1}

    return attempt


def _one_stops(state):
    def attempt(site, book, number):
        site.add(book.prompts(range(3 * BATCH)))
        figures = stop(site, state, SIGNALS[number % len(SIGNALS)])
        site.go()
        finish(site)
        return {"kills": 1, **figures}

    return attempt


def _one_sleeps(site, book, number):
    site.add(book.prompts(range(3 * BATCH)))
    sleep_through_the_lease(site)
    return {"kills": 1}


def _one_dies_waiting(site, book, number):
    site.add(book.prompts(range(6 * BATCH)))
    die_with_pictures_waiting(site, "killed")
    finish(site)
    return {"kills": 1}


def _poisoned(site, book, number):
    plant_poison(site, book)
    for death in range(DEADLY):
        die_of_it(site, f"death-{death}")
    finish(site, status=3)
    return {"kills": DEADLY}


def _crowded(prompts, kills):
    def attempt(site, book, number):
        site.add(book.prompts(range(prompts)))
        return {"kills": crowd(site, of=prompts, kills=kills, chance=Random(number), seconds=3600)}

    return attempt


@contextmanager
def _servers():
    """What makes a new site for a fault, in a folder that is gone afterwards, with the servers running."""
    with tempfile.TemporaryDirectory(prefix="text2img-chaos-") as root, _wired(Path(root)) as wire:
        book = rehearse()

        @contextmanager
        def site_in(fault):
            with tempfile.TemporaryDirectory(dir=root) as folder:
                place = Path(folder)
                with file_site(place) if "SQLite" in fault else wire_site(place, wire) as site:
                    yield site, book

        yield site_in


@contextmanager
def _wired(root):
    with mongodb_in(root / "mongodb") as uri, gcs_in(root / "gcs") as gcs, wired(uri, gcs) as wire:
        yield wire


def _kept():
    return [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []


def _keep(attempt):
    sys.stderr.write(json.dumps(attempt) + "\n")
    with KEPT.open("a") as file:
        file.write(json.dumps(attempt) + "\n")


if __name__ == "__main__":
    sys.exit(main())
