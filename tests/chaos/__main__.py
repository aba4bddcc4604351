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
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from random import Random
from types import SimpleNamespace

from tests.acceptance import product
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
from tests.chaos.points import POINTS, Drawn, add_styled
from tests.chaos.rehearsal import rehearse
from tests.chaos.sites import file_site, wire_site, wired
from tests.chaos.stops import IDLE, SIGNALS, STATES, TARGET, is_late, stop
from tests.chaos.table import PROMISED, table, table_of_stops
from tests.chaos.workers import BATCH, pictures_made
from tests.servers.gcs import gcs_in
from tests.servers.mongodb import mongodb_in
from tests.servers.rabbitmq import rabbitmq_in

POISONED = "a prompt that kills its worker, SQLite"
KEPT = Path(__file__).parents[2] / ".chaos" / "tries.jsonl"


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Kill workers at named points, ask runs to end, and count what is left.",
        epilog="Exit status 1: something was lost, twice, stuck, wrong or undelivered, or a run that was "
        f"asked to end took over {TARGET:g} s although the cores were less than {IDLE:.0%} busy in the "
        "second before. On busier cores its seconds are only printed, with how busy the cores were.",
    )
    parser.add_argument("--kills", type=int, default=20, help="at each point, and stops in each state")
    parser.add_argument("--crowd", type=int, nargs=2, default=(1000, 300), help="prompts: SQLite, MongoDB")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORDS", help="only at points whose name has any of these"
    )
    arguments = parser.parse_args()
    KEPT.parent.mkdir(exist_ok=True)
    with _servers() as site_in:
        for fault, number, attempt in _tries(arguments.kills, *arguments.crowd):
            if not any(words in fault for words in arguments.only):
                continue
            if (fault, number) not in {(each["fault"], each["number"]) for each in _kept()}:
                with site_in(fault) as (site, book):
                    figures = attempt(site, book, number)
                    poison = {POISON} if fault == POISONED else set()
                    shown = getattr(site, "book", book)
                    counts = asdict(count(site, shown, pictures_made(site), poison))
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
        for name, point in POINTS.items():
            yield name, number, point.attempt
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
        site.add(book.prompts(range(1), state.word))
        site.add(book.prompts(range(1, 3 * BATCH)))
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
    with tempfile.TemporaryDirectory(prefix="text2img-chaos-") as root, ExitStack() as stack:
        book = rehearse()
        servers = Servers(Path(root), stack, book)

        @contextmanager
        def site_in(fault):
            with tempfile.TemporaryDirectory(dir=root) as folder, _site(fault, Path(folder), servers) as site:
                yield site, book

        yield site_in


def _site(fault, place, servers):
    if fault in POINTS:
        return POINTS[fault].site(place, servers)
    return file_site(place) if "SQLite" in fault else wire_site(place, servers.wire)


class Servers:
    """What several tries share; each is started when the first of them needs it, and ends with the stack."""

    def __init__(self, root, stack, book):
        self._root, self._stack, self._book = root, stack, book

    @cached_property
    def wire(self):
        uri = self._stack.enter_context(mongodb_in(self._root / "mongodb"))
        gcs = self._stack.enter_context(gcs_in(self._root / "gcs"))
        return self._stack.enter_context(wired(uri, gcs))

    @cached_property
    def rabbitmq(self):
        folder = self._root / "rabbitmq"
        folder.mkdir()
        return self._stack.enter_context(rabbitmq_in(folder))

    @cached_property
    def styles(self):
        """A folder with two LoRAs for the demo's model."""
        from diffusers import UNet2DConditionModel

        from tests.engine import loras

        demo = SimpleNamespace(unet=UNet2DConditionModel.from_pretrained(product.MODEL / "unet"))
        folder = self._root / "styles"
        folder.mkdir()
        for seed, name in enumerate(("one", "other")):
            loras.save(folder, loras.tensors(loras.halves(demo, size=0.3, seed=seed)), name)
        return folder

    @cached_property
    def switched(self):
        """The images of these LoRAs' batches when nothing goes wrong."""
        name = next(name for name in POINTS if "switched" in name)
        self.__dict__["switched"] = None  # the site asks for it, too
        with POINTS[name].site(self._root / "switched", self) as site:
            add_styled(site, self._book)
            finish(site, engine=product.drawing)
            return Drawn(site)


def _kept():
    return [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []


def _keep(attempt):
    sys.stderr.write(json.dumps(attempt) + "\n")
    with KEPT.open("a") as file:
        file.write(json.dumps(attempt) + "\n")


if __name__ == "__main__":
    sys.exit(main())
