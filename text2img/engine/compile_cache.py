"""The folder that keeps what was compiled, and what compiling was seen to cost and bring, for later runs.

The compiled code in it is torch's own business (TORCHINDUCTOR_CACHE_DIR); it is code, and whoever can write
to the folder can have it run. Beside it lies one small file of our own with what was measured.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Final

from text2img.engine.compile_cost import Estimate
from text2img.errors import ConfigurationError

logger = logging.getLogger(__name__)

_MEASURED: Final = "text2img-measured.json"


class CompileCache:
    """Remembers estimates by key in ``folder``; without a folder nothing is known and nothing kept."""

    def __init__(self, folder: str | None) -> None:
        self._folder = Path(folder).expanduser().absolute() if folder else None

    def check(self) -> None:
        """Raise ConfigurationError where the folder cannot be written to, or not be made; makes nothing."""
        if self._folder is None:
            return
        nearest = next(one for one in (self._folder, *self._folder.parents) if one.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise ConfigurationError(
                f"--compile-cache (COMPILE_CACHE): {self._folder} cannot be written to; name another folder,"
                " or none"
            )

    def open(self) -> None:
        """Have torch keep what it compiles in the folder, from now on in this process; OSError where the
        folder cannot be made after all.
        """
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self._folder)

    def recall(self, key: str) -> Estimate | None:
        """What an earlier run measured; None where none did, or where its file cannot be read."""
        known = self._read().get(key)
        try:
            return Estimate(gain=float(known["gain"]), cost=float(known["cost"])) if known else None
        except (TypeError, ValueError, LookupError):
            return None

    def remember(self, key: str, measured: Estimate) -> None:
        """Keep what was measured, in place of what was known by that key; a full disk costs only this."""
        if self._folder is None:
            return
        everything = self._read() | {key: {"gain": measured.gain, "cost": measured.cost}}
        try:
            self._write(self._folder, json.dumps(everything, indent=1, ensure_ascii=False))
        except OSError as exc:
            logger.warning("what compiling brought could not be kept in %s: %s", self._folder, exc)

    def _read(self) -> dict[str, Any]:
        if self._folder is None:
            return {}
        try:
            content = json.loads((self._folder / _MEASURED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @staticmethod
    def _write(folder: Path, text: str) -> None:
        """Replace the file in one step: other workers read it at any time."""
        with tempfile.NamedTemporaryFile("w", dir=folder, encoding="utf-8", delete=False) as file:
            new = Path(file.name)
            try:
                file.write(text)
                file.flush()
                new.replace(folder / _MEASURED)
            finally:
                new.unlink(missing_ok=True)
