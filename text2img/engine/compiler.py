"""torch's compiler at one denoiser: set up once, and switched on and off from batch to batch.

When that pays and for which batches, ``compiling`` decides.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from text2img.engine.compile_policy import Estimate
from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from text2img.engine.lora_adapters import Adapters, LoraCapacity


_MOST: Final = 64
"""Shapes and sizes that one run compiles at the most; torch alone stops at 8."""


class Compiler:
    """Compiles one denoiser, on ``device``, with the LoRAs that are active among ``adapters``.

    ``name`` says what a measurement of it holds for: chip, versions, model. ``denoiser`` None, and "", where
    it is not known what the denoiser is.
    """

    def __init__(self, denoiser: Any, device: str, adapters: Adapters) -> None:
        self._denoiser, self._adapters = denoiser, adapters
        self._installed = False
        self.device = device
        self.name = "" if denoiser is None else _name(denoiser, device)

    def install(self, cache: CompileCache) -> None:
        """Once: have the denoiser compiled whole, or where it is one block over and over, that block.

        The UNets name their attention blocks as repeated too; their convolutions would stay uncompiled.
        """
        if self._installed:
            return
        import torch
        from torch._logging import set_logs

        cache.open()
        self._installed = True
        torch.compiler.config.recompile_limit = _MOST
        set_logs(all=logging.ERROR)  # unless the variable TORCH_LOGS asks for more
        repeats = getattr(self._denoiser, "_repeated_blocks", None) and not hasattr(self._denoiser, "conv_in")
        compile_ = self._denoiser.compile_repeated_blocks if repeats else self._denoiser.compile
        compile_(fullgraph=True, dynamic=False)

    @contextlib.contextmanager
    def stance(self, *, compiled: bool) -> Iterator[None]:
        """Within it the denoiser runs compiled, or as if nothing had ever been."""
        if not self._installed:
            yield
            return
        import torch

        standing = self._adapters.use_buffers() if compiled else contextlib.nullcontext()
        with standing, torch.compiler.set_stance("default" if compiled else "force_eager"):
            yield

    def room(self) -> LoraCapacity | None:
        """What the active LoRAs need, which decides what code they run on; None where none can be made."""
        return self._adapters.room()

    @property
    def graphs(self) -> int:
        """Graphs that torch has compiled so far in this process."""
        if not self._installed:
            return 0
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])

    def close(self) -> None:
        """Forget what was compiled, which holds the denoiser's weights."""
        if self._installed:
            import torch

            torch.compiler.reset()


def _name(denoiser: Any, device: str) -> str:
    import diffusers
    import torch

    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    weights = sum(one.numel() for one in denoiser.parameters())
    model = f"{type(denoiser).__name__} of {weights:,} weights in {denoiser.dtype}"
    return f"{device} {chip}; torch {torch.__version__}, diffusers {diffusers.__version__}; {model}"


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
