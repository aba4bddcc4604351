"""What all tests share: one thread for torch, no hub, and the servers that fixtures start."""

from __future__ import annotations

import os

# Before anything imports torch or the hub's client: two OpenMP threads on busy cores stall badly, and a
# test must not reach for a network that is not its own.
os.environ.update(
    OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
)

pytest_plugins = [
    *("tests.servers.mongodb", "tests.servers.gcs", "tests.servers.s3"),
    *("tests.servers.rabbitmq", "tests.servers.fal", "tests.servers.chromium"),
]
