"""Workers: real processes of the product, and what may happen to them.

Their engine sleeps and paints (``tests/fakes/sleeping.py``): what is tried is the flow around it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress

from tests.acceptance import product
from tests.waiting import until

BATCH = 4
STEPS = 8
LEASE = 3
"""Seconds: long enough for a busy machine, short enough to be waited for."""
PER_IMAGE = 0.05
"""Seconds of the sleeping device; where it matters that a batch is there, the device holds it."""
JOB = [
    *("--model-id", str(product.MODEL), "--num-inference-steps", str(STEPS), "--guidance-scale", "4"),
    *("--batch-size", str(BATCH), "--lease-seconds", str(LEASE), "--log-level", "DEBUG"),
]


class Worker:
    """A run on a site, killed if it still lives at the end of the block; its log stays in the folder.

    ``holds``: where it stands still until ``site.go()``: ``"load"``, or the number of one of its batches.
    ``engine``: what draws, ``product.drawing`` in place of the engine that sleeps.
    """

    def __init__(self, site, run_id, *flags, holds="", engine=product.sleeping):
        self.run_id, self._site, self._log = run_id, site, site.folder / f"{run_id}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                engine.command(*site.arguments, *JOB, "--run-id", run_id, *flags),
                cwd=site.folder,
                env=product.environment(
                    site.folder, SLEEP_PER_IMAGE=str(PER_IMAGE), SLEEP_HOLD=str(holds), **site.variables
                ),
                stdout=subprocess.DEVNULL,
                stderr=log,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.kill()

    @property
    def lives(self):
        return self._process.poll() is None

    @property
    def busy(self):
        """Whether it lives and has its model loaded."""
        return self.lives and '"event": "loaded"' in self.text

    def kill(self):
        """SIGKILL: nothing of the worker runs any more when this returns."""
        self._process.kill()
        return self._process.wait()

    def asked_to_end(self, number, seconds=product.HANG):
        """Its exit status, once it has ended because of this signal."""
        self._process.send_signal(number)
        return self._process.wait(seconds)

    def freeze(self):
        """SIGSTOP: no thread of it does anything until it is thawed; it is not in the midst of a write."""
        until(self._stands_between_writes)

    def _stands_between_writes(self):
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)
        if not (stands := self._site.can_be_written()):
            self.thaw()
        return stands

    def thaw(self):
        self._process.send_signal(signal.SIGCONT)

    def wait(self, seconds=product.HANG):
        """Its exit status."""
        return self._process.wait(seconds)

    def reaches(self, condition):
        """The condition's value once it is true; an error with the log's end should the worker end before."""
        return until(condition, lambda: not self.lives and f"{self.run_id}: {self.text[-3000:]}")

    def lives_on(self, seconds):
        """Let it go on for so long, or until it ends by itself."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    @property
    def text(self):
        """Its log so far."""
        return self._log.read_text()


def pictures_made(site):
    """How many pictures all workers' devices have finished on this site."""
    logs = [path.read_text().splitlines() for path in site.folder.glob("*.log")]
    lines = [line for log in logs for line in log if '"event": "batch"' in line and line.endswith("}")]
    return sum(json.loads(line)["size"] for line in lines)
