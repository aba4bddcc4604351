"""One measuring process: ``python -m benchmarks.gpu.measures NAME TASK``, the task as JSON.

Prints one JSON object a line, each as soon as it is known, so that what was measured before a failure or the
end of the time is kept. Each kind of figure has a process of its own: memory, caches and compiled code of
one never help another.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.gpu.task import TEXT, Task, kept_pictures
from text2img.engine.devices import silence_libraries, suppress_warnings
from text2img.errors import PromptFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from text2img.engine import Engine

_FEWEST = 2  # timed calls of a figure, at least; XL's take many seconds
_MANY = 1_000_000  # prompts that wait: compiling pays


def tell(row: str, **figures: object) -> None:
    """Print one row."""
    sys.stdout.write(json.dumps({"row": row, **figures}) + "\n")
    sys.stdout.flush()


def roof(task: Task) -> None:
    """The chip, and the most TFLOP/s that it reaches in a large matrix product, accumulated as torch does."""
    import torch

    name = torch.cuda.get_device_name() if task.device == "cuda" else "CPU"
    sizes = (256,) if task.rehearsal else (8192, 16_384)
    tell("roof", chip=name, tflops=max(_product(task, size) for size in sizes))


def _product(task: Task, size: int) -> float:
    import torch

    kind = {"device": task.device, "dtype": getattr(torch, task.dtype)}
    one, other = torch.randn(size, size, **kind), torch.randn(size, size, **kind)
    took = _times(lambda: one @ other, task, at_most=2.0)
    return float(2 * size**3 / median(took) / 1e12)


def build(task: Task) -> None:
    """Write the model with its random weights, and a tiny autoencoder beside it."""
    from benchmarks.gpu.models import MODELS, save, save_tiny_autoencoder, tiny

    model = MODELS[task.model]
    save(tiny(model) if task.rehearsal else model, Path(task.folder), task.device, task.dtype)
    save_tiny_autoencoder(Path(f"{task.folder}-autoencoder"), task.dtype)


def eager(task: Task) -> None:
    """Diffusers as it comes, one prompt at a time and in batches; then the engine, nothing compiled."""
    for batch in (1, task.batch):
        tell(f"bare eager diffusers, batch {batch}", **_pace(_bare(task, batch), batch, task))
    observed = Observed(task.open(), task)
    tell("ours, eager", **_pace(observed.generate, task.batch, task), **observed.figures())
    np.save(kept_pictures(task), observed.pictures[-1])


def compiled(task: Task) -> None:
    """The engine, its denoiser compiled before the first batch; how long that took, and what it changed."""
    engine = task.open()
    begun = time.perf_counter()
    engine.warm_up(task.requests(engine, 0, task.batch), _MANY)  # type: ignore[attr-defined,unused-ignore]
    observed = Observed(engine, task)
    observed.generate()
    first, graphs = time.perf_counter() - begun, _graphs()
    pace = _pace(observed.generate, task.batch, task)
    tell(
        "ours, compiled" if graphs or task.rehearsal else "ours, not compiled though asked to",
        **pace,
        **observed.figures(),
        compile_seconds=engine.seconds.get("compile", first),
        graphs=graphs,
        recompilations=_graphs() - graphs,
        **_difference(observed.pictures[-1], task),
    )


def option(task: Task) -> None:
    """The engine with an approximation that somebody asked for."""
    engine = task.open()
    if hasattr(engine, "warm"):
        engine.warm_up(task.requests(engine, 0, task.batch), _MANY)
    observed = Observed(engine, task)
    changes = {name: value for name, value in task.engine.items() if not name.startswith("compile")}
    said = ", ".join(f"{name} {Path(str(value)).name}" for name, value in changes.items())
    steps = f"{task.steps} steps, guidance {task.guidance:g}"
    tell(f"ours, {said or steps}", **_pace(observed.generate, task.batch, task), approximate=True)


def job(task: Task) -> None:
    """The whole job, 150 ms from its storage and 20 ms from its database."""
    from benchmarks.gpu.distant import distant_job

    tell("the whole job", **distant_job(task))


class Observed:
    """An engine that generates the same batch again and again.

    ``pictures`` are those of the first and the last time, uint8 (batch, side, side, 3).
    """

    def __init__(self, engine: Engine, task: Task) -> None:
        self._engine, self._requests = engine, task.requests(engine, 0, task.batch)
        self._cuda = task.device == "cuda"
        self._denoise = self._decode = 0
        self.pictures: list[NDArray[np.uint8]] = []

    def generate(self) -> None:
        """The batch once more. Raises RuntimeError where a picture could not be made."""
        import torch

        self._denoise = 0
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        made = self._engine.generate(self._requests, self._stepped)
        failed = [each for each in made if isinstance(each, PromptFailed)]
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(made)} pictures failed: {failed[0]}")
        if self._cuda:
            self._decode = torch.cuda.max_memory_allocated()
        pixels = np.stack([each.pixels for each in made if not isinstance(each, PromptFailed)])
        self.pictures = [*self.pictures[:1], pixels]

    def figures(self) -> dict[str, Any]:
        """Whether the last time gave the first one's pictures bit by bit, and the peaks of memory in bytes
        while denoising and while decoding; CUDA only.
        """
        same = {"bit_equal": bool((self.pictures[0] == self.pictures[-1]).all())}
        return {**same, "denoise_bytes": self._denoise, "decode_bytes": self._decode} if self._cuda else same

    def _stepped(self, done: int, of: int) -> None:
        import torch

        if self._cuda:
            self._denoise = max(self._denoise, torch.cuda.max_memory_allocated())
            if done == of:
                torch.cuda.reset_peak_memory_stats()


def _difference(pixels: NDArray[np.uint8], task: Task) -> dict[str, Any]:
    """How far the pictures are from those that the eager engine made of the same requests."""
    file = kept_pictures(task)
    if not file.exists():
        return {}
    off = np.abs(np.load(file).astype(np.int16) - pixels)
    return {"levels_off_at_most": int(off.max()), "values_off": float((off > 0).mean())}


def _peaks(engine: Engine, task: Task) -> dict[str, Any]:
    """The most bytes that tensors held while denoising and while decoding one batch; CUDA only."""
    import torch

    if task.device != "cuda":
        return {}
    held = {"denoise": 0}

    def stepped(done: int, of: int) -> None:
        held["denoise"] = max(held["denoise"], torch.cuda.max_memory_allocated())
        if done == of:
            torch.cuda.reset_peak_memory_stats()

    torch.cuda.reset_peak_memory_stats()
    engine.generate(task.requests(engine, 0, task.batch), stepped)
    return {"denoise_bytes": held["denoise"], "decode_bytes": torch.cuda.max_memory_allocated()}


def _bare(task: Task, batch: int) -> Callable[[], object]:
    """Diffusers' own pipeline from the same folder, called as its documentation does."""
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(task.folder, dtype=getattr(torch, task.dtype)).to(task.device)
    pipe.set_progress_bar_config(disable=True)

    def call() -> object:
        return pipe(
            prompt=[TEXT] * batch,
            negative_prompt=["blurry, dark"] * batch,
            num_inference_steps=task.steps,
            guidance_scale=task.guidance,
            generator=[torch.Generator("cpu").manual_seed(number) for number in range(batch)],
        ).images

    return call


def _pace(call: Callable[[], object], batch: int, task: Task) -> dict[str, Any]:
    took = _times(call, task, at_most=task.seconds)
    pace = batch / median(took)
    return {
        "images_per_second": pace,
        "tflops": pace * task.teraflop(),
        "calls": len(took),
        "spread": (max(took) - min(took)) / median(took),
    }


def _times(call: Callable[[], object], task: Task, at_most: float) -> list[float]:
    """Seconds of each call, until ``at_most`` have passed; the first call only warms up."""
    _timed(call, task)
    took: list[float] = []
    while len(took) < _FEWEST or sum(took) < at_most:
        took.append(_timed(call, task))
    return took


def _timed(call: Callable[[], object], task: Task) -> float:
    import torch

    begun = time.perf_counter()
    call()
    if task.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _graphs() -> int:
    """How many graphs were compiled in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


MEASURES = {each.__name__: each for each in (roof, build, eager, compiled, option, job)}


if __name__ == "__main__":
    with suppress_warnings():
        silence_libraries()
        MEASURES[sys.argv[1]](Task(**json.loads(sys.argv[2])))
