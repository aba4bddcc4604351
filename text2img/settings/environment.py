"""Checks of variables that libraries read by themselves, so that a wrong one is named before any work."""

from __future__ import annotations

import os
from pathlib import Path

from text2img.errors import ConfigurationError


def check_url_variables(*names: str) -> None:
    """Raise ConfigurationError for the first of these variables that is set, and is no URL of a service."""
    for name in names:
        value = os.environ.get(name, "")
        if value and not value.lower().startswith(("http://", "https://")):
            raise ConfigurationError(
                f"{name} must begin with http:// or https://; it lacks that: write {name}=http://HOST:PORT"
            )


def check_certificate_variables(*names: str) -> None:
    """Raise ConfigurationError for the first of these variables that names no existing file or folder."""
    for name in names:
        value = os.environ.get(name, "")
        if value and not Path(value).exists():
            raise ConfigurationError(
                f"{name} names {value[:200]}, which does not exist; mount the certificates there, or unset it"
            )
