"""Workers: real ``python main.py`` processes, and what may happen to them."""

from __future__ import annotations

import json
import signal
import subprocess
from contextlib import suppress

from tests.acceptance import product
from tests.waiting import until

BATCH = 4
LEASE = 3
"""Seconds: long enough for a busy machine, short enough to be waited for."""
JOB = [
    *("--model-id", str(product.MODEL), "--num-inference-steps", "8", "--guidance-scale", "4"),
    *("--batch-size", str(BATCH), "--lease-seconds", str(LEASE), "--log-level", "DEBUG"),
]


class Worker:
    """A run on a site, killed if it still lives at the end of the block; its log stays in the folder."""

    def __init__(self, site, run_id, *flags):
        self.run_id, self._log = run_id, site.folder / f"{run_id}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                product.command(*site.arguments, *JOB, "--run-id", run_id, *flags),
                cwd=site.folder,
                env=product.environment(site.folder, **site.variables),
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

    def asked_to_end(self, number, seconds=120):
        """Its exit status, once it has ended because of this signal."""
        self._process.send_signal(number)
        return self._process.wait(seconds)

    def freeze(self):
        """SIGSTOP: no thread of it does anything until it is thawed."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self._process.send_signal(signal.SIGCONT)

    def wait(self, seconds=120):
        """Its exit status."""
        return self._process.wait(seconds)

    def reaches(self, condition):
        """Wait until the condition is true; an error with the log's end should the worker end before."""
        until(condition, lambda: not self.lives and f"{self.run_id}: {self.text[-3000:]}")

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
