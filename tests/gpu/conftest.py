"""Tiny models on disk for the tests that need a CUDA device."""

from __future__ import annotations

import pytest

from text2img.engine.devices import silence_libraries, suppress_warnings

with suppress_warnings():
    silence_libraries()
    from tests.engine import models


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The folder of a family's tiny model, written once; nobody may change it."""
    root = tmp_path_factory.mktemp("tiny")

    def saved(family):
        path = root / family
        with suppress_warnings():
            return path if path.exists() else models.save(family, path)

    return saved
