"""What could matter for making the same pictures again: the versions that a run's document carries."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from text2img import __version__

_NAMED: Final = (
    *("torch", "diffusers", "transformers", "peft"),
    *("pymongo", "google-cloud-storage", "boto3", "pillow"),
)


def versions() -> dict[str, str]:
    """By name; what is not installed is left out."""
    known = {"python": platform.python_version(), "text2img": __version__}
    for name in _NAMED:
        with suppress(PackageNotFoundError):
            known[name] = version(name)
    return known
