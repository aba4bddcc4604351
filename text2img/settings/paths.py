"""Paths that may begin with ``~``, on machines where the user may have no home directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from text2img.errors import ConfigurationError


def expand_home(path: str, option: str) -> Path:
    """Return the path with a leading ``~`` replaced by the home directory.

    Raises ConfigurationError, which names the option, if there is none: a container's user may have neither
    HOME nor an entry in the user database.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigurationError(
            f"{option}: {path[:200]} begins in a home directory, and there is none; give an absolute path,"
            " or set HOME"
        ) from None


_HUB_VARIABLES: Final = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")


def check_hub_cache() -> None:
    """Raise ConfigurationError if the hub's client has no folder for its cache.

    Without a home directory it would create a folder named ``~`` in the working directory.
    """
    if not any(os.environ.get(name) for name in _HUB_VARIABLES):
        expand_home("~/.cache/huggingface", "HF_HOME")
