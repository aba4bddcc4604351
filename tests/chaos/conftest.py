"""The servers behind their gates, and the pictures that all runs are compared with."""

from __future__ import annotations

import pytest

from tests.chaos.rehearsal import rehearse
from tests.chaos.sites import file_site, wire_site, wired


@pytest.fixture(scope="session")
def book():
    """Prompts, with their pictures when nothing goes wrong."""
    return rehearse()


@pytest.fixture
def wire(mongodb_server, gcs_server):
    """MongoDB and a bucket, each behind a gate."""
    with wired(mongodb_server, gcs_server) as wire:
        yield wire


@pytest.fixture
def over_the_wire(tmp_path, wire):
    """An empty site on these, with a listener."""
    with wire_site(tmp_path / "site", wire) as site:
        yield site


@pytest.fixture
def in_files(tmp_path):
    """An empty site in a SQLite file and a folder, with a listener."""
    with file_site(tmp_path / "site") as site:
        yield site
