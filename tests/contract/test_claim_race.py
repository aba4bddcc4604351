"""Real processes race for the same prompts: each prompt goes to exactly one of them, and none is left."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from itertools import chain

import pytest

from tests.contract.database_suite import ALL, texts
from tests.outcomes import completed


def _race(url, workers, limit):
    """What each of the processes has claimed, in its helpings."""
    command = [sys.executable, "-m", "tests.contract.racer", url]
    racers = [
        subprocess.Popen(
            [*command, f"w{n}", str(limit)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for n in range(workers)
    ]
    try:
        for racer in racers:
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            racer.stdin.write("go\n")
            racer.stdin.flush()
        return [json.loads(racer.communicate(timeout=60)[0]) for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


@pytest.mark.parametrize(("prompts", "limit"), [(200, 10), (50, 1)])
def test_racing_processes_never_share_a_prompt(stand, prompts, limit):
    """Four processes (two against a server) take all prompts, and each of them once."""
    for n in range(prompts):
        stand.put({"_id": n})
    got = _race(stand.backend.url, 4 if stand.backend.kind == "sqlite" else 2, limit)
    claimed = list(chain.from_iterable(chain.from_iterable(got)))
    assert sorted(map(int, claimed)) == list(range(prompts))
    assert {stand.get(n)["claim_number"] for n in range(0, prompts, 20)} == {1}
    if stand.backend.kind != "sqlite":  # whose lock goes to whoever asks first: one may take all at once
        assert all(got)  # nobody starved


def test_racing_threads_of_one_worker_never_share_a_prompt(stand):
    """One database object serves several threads at once, also under one worker's name."""
    for n in range(60):
        stand.put({"_id": n})
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
        thread.join(60)
    assert sorted(map(int, got)) == list(range(60))
    assert lost == []
    assert stand.database.counts(ALL).completed == 60
