"""torch's compiler for one denoiser, switched on and off per batch, and the cache of its measurements.

``compile_policy`` decides when to compile and for which batches.
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
from text2img.settings import expand_home

if TYPE_CHECKING:
    from collections.abc import Iterator

    from text2img.engine.lora_adapters import Adapters, LoraCapacity


_MAX_RECOMPILATIONS: Final = 64
"""Maximum number of shapes and sizes that a process compiles; torch's own default is 8."""


class Compiler:
    """Compiles one denoiser, on ``device``, with the LoRAs that are active among ``adapters``.

    ``name`` names what a measurement is valid for: chip, versions, model. It is "" where the pipeline's
    denoiser is unknown; ``denoiser`` is then None.
    """

    def __init__(self, denoiser: Any, device: str, adapters: Adapters) -> None:
        self._denoiser, self._adapters = denoiser, adapters
        self._installed = False
        self.device = device
        self.name = "" if denoiser is None else _describe(denoiser, device)

    def install(self, cache: CompileCache) -> None:
        """Set up the compiler once: for the whole denoiser, or for its block where it repeats a block.

        UNets declare their attention blocks as repeated, too; compiled by block, their convolutions would
        stay uncompiled.
        """
        if self._installed:
            return
        import torch
        from torch._logging import set_logs

        cache.open()
        self._installed = True
        torch.compiler.config.recompile_limit = _MAX_RECOMPILATIONS
        set_logs(all=logging.ERROR)  # TORCH_LOGS overrides this
        repeats = getattr(self._denoiser, "_repeated_blocks", None) and not hasattr(self._denoiser, "conv_in")
        compile_ = self._denoiser.compile_repeated_blocks if repeats else self._denoiser.compile
        compile_(fullgraph=True, dynamic=False)

    @contextlib.contextmanager
    def stance(self, *, compiled: bool) -> Iterator[None]:
        """Run the denoiser compiled within the context, or as if it had never been compiled."""
        if not self._installed:
            yield
            return
        import torch

        lora_buffers = self._adapters.use_buffers() if compiled else contextlib.nullcontext()
        with lora_buffers, torch.compiler.set_stance("default" if compiled else "force_eager"):
            yield

    def lora_capacity(self) -> LoraCapacity | None:
        """Return what the active LoRAs need, which selects the code they run on; None if too much."""
        return self._adapters.capacity()

    @property
    def graphs(self) -> int:
        """Graphs that torch has compiled so far in this process."""
        if not self._installed:
            return 0
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])

    def close(self) -> None:
        """Discard the compiled code, which holds the denoiser's weights."""
        if self._installed:
            import torch

            torch.compiler.reset()


def _describe(denoiser: Any, device: str) -> str:
    import diffusers
    import torch

    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    weights = sum(weight.numel() for weight in denoiser.parameters())
    model = f"{type(denoiser).__name__} of {weights:,} weights in {denoiser.dtype}"
    return f"{device} {chip}; torch {torch.__version__}, diffusers {diffusers.__version__}; {model}"


logger = logging.getLogger(__name__)

_FILE_NAME: Final = "text2img-measured.json"


class CompileCache:
    """Keeps estimates by key in ``folder``; without a folder it stays empty."""

    def __init__(self, folder: str | None) -> None:
        self._folder = expand_home(folder, "--compile-cache (COMPILE_CACHE)").absolute() if folder else None

    def check(self) -> None:
        """Raise ConfigurationError if the folder cannot be created or written to; creates nothing."""
        if self._folder is None:
            return
        existing = next(path for path in (self._folder, *self._folder.parents) if path.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigurationError(
                f"--compile-cache (COMPILE_CACHE): {self._folder} cannot be written to; use another folder,"
                " or none"
            )

    def open(self) -> None:
        """Make torch keep its compiled code in the folder, for the rest of this process.

        Raises OSError if the folder cannot be created.
        """
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(self._folder)

    def get(self, key: str) -> Estimate | None:
        """Return an earlier run's measurement; None if there is none or its file is unreadable."""
        entry = self._read().get(key)
        try:
            return Estimate(gain=float(entry["gain"]), cost=float(entry["cost"])) if entry else None
        except (TypeError, ValueError, LookupError):
            return None

    def put(self, key: str, estimate: Estimate) -> None:
        """Store an estimate, replacing the key's earlier one; a full disk loses only this estimate."""
        if self._folder is None:
            return
        measurements = self._read() | {key: {"gain": estimate.gain, "cost": estimate.cost}}
        try:
            self._write(self._folder, json.dumps(measurements, indent=1, ensure_ascii=False))
        except OSError as exc:
            logger.warning("the compile measurements could not be kept in %s: %s", self._folder, exc)

    def _read(self) -> dict[str, Any]:
        if self._folder is None:
            return {}
        try:
            content = json.loads((self._folder / _FILE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    @staticmethod
    def _write(folder: Path, text: str) -> None:
        """Replace the file atomically: other workers may read it at any time."""
        with tempfile.NamedTemporaryFile("w", dir=folder, encoding="utf-8", delete=False) as file:
            new = Path(file.name)
            try:
                file.write(text)
                file.flush()
                new.replace(folder / _FILE_NAME)
            finally:
                new.unlink(missing_ok=True)
