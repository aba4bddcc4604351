"""Real processes race for the same prompts: each prompt goes to exactly one of them, and none is left."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from itertools import chain

from tests.contract.database_suite import ALL, texts
from tests.outcomes import completed


@contextmanager
def _racers(url, workers):
    """Processes that are ready to race for the database's prompts."""
    command = [sys.executable, "-m", "tests.contract.racer", url]
    racers = [
        subprocess.Popen([*command, f"w{n}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in range(workers)
    ]
    try:
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        yield racers
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


def _race(racers, limit):
    """What each of the processes has claimed, in its helpings."""
    for racer in racers:
        racer.stdin.write(f"{limit}\n")
        racer.stdin.flush()
    return [json.loads(racer.stdout.readline()) for racer in racers]


def test_racing_processes_never_share_a_prompt(stand):
    """Four processes (two against a server) take all prompts, each of them once: by tens, then one by one."""
    with _racers(stand.backend.url, 4 if stand.backend.kind == "sqlite" else 2) as racers:
        for ids, limit in ((range(150), 10), (range(150, 190), 1)):
            stand.put(*({"_id": n} for n in ids))
            got = _race(racers, limit)
            claimed = list(chain.from_iterable(chain.from_iterable(got)))
            assert sorted(map(int, claimed)) == list(ids)
            assert {stand.get(n)["claim_number"] for n in ids[::20]} == {1}
            if stand.backend.kind != "sqlite":  # whose lock goes to whoever asks first: one may take all
                assert all(got)  # nobody starved


def test_racing_threads_of_one_worker_never_share_a_prompt(stand):
    """One database object serves several threads at once, also under one worker's name."""
    stand.put(*({"_id": n} for n in range(60)))
    got, lost = [], []

    def work():
        while prompts := stand.claim("w", 7):
            got.extend(texts(prompts))
            written = stand.record(*(completed(prompt) for prompt in prompts))
            lost.extend(prompts[len(written) :])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, got)) == list(range(60))
    assert lost == []
    assert stand.database.runs.counts(ALL).completed == 60
