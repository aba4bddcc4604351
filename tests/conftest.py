"""What all tests share: one thread for torch, no hub, the servers that fixtures start, and their turns."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

from tests.examples import load_profile

# Collections while the libraries are imported and the tests collected find nothing, and take seconds.
gc.disable()

# Before anything imports torch or the hub's client: two OpenMP threads on busy cores stall badly, and a
# test must not reach for a network that is not its own.
os.environ.update(
    OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
)

load_profile()

pytest_plugins = [
    *("tests.servers.mongodb", "tests.servers.gcs", "tests.servers.s3"),
    *("tests.servers.rabbitmq", "tests.servers.fal", "tests.servers.chromium"),
]

HERE = Path(__file__).parent
FIRST = (
    *(
        "acceptance/test_workers.py",
        "acceptance/test_workers_in_a_cluster.py",
        "engine/test_compiled_loras.py",
    ),
    *("acceptance/test_serve_away.py", "acceptance/test_loras.py"),
)
"""Files that take longest, most of it waiting: begun first, so that no core is idle at the end."""
FOLDERS = ("acceptance", "chaos", "engine", "contract", "evaluation", "benchmarks")
"""Whose files follow; those of other folders, which are short, come last."""

FULL = ("chaos", "acceptance", "benchmarks", "gpu")
"""Folders whose tests only ``make test-all`` runs, except for those marked ``smoke``."""


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items):
    """Mark what only ``make test-all`` runs, and sort by how long files take.

    ``--no-loadscope-reorder`` lets xdist, which shares out the files, keep to that order.
    """
    for item in items:
        by_folder = _folder(item) in FULL and not item.get_closest_marker("smoke")
        if by_folder or item.get_closest_marker("compiler"):
            item.add_marker("full")
    items.sort(key=_turn)


def pytest_collection_finish():
    """Collect garbage again, but none of what was made until here, which stays to the end."""
    gc.freeze()
    gc.enable()


def _folder(item):
    return item.path.relative_to(HERE).parts[0]


def _turn(item):
    folder, name = _folder(item), item.path.relative_to(HERE).as_posix()
    first = FIRST.index(name) if name in FIRST else len(FIRST)
    return first, FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One for each core; one more for the full suite, whose processes wait for leases or an outage."""
    return (os.cpu_count() or 1) + (0 if config.option.markexpr == "not full" else 1)
