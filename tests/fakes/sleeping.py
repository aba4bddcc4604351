"""``text2img`` with an engine that sleeps and paints in place of one that draws: no torch, no weights.

For tests whose subject is not the engine: a process is up in half a second where one that draws needs ten.
Run it as ``python tests/fakes/sleeping.py ARGUMENTS``, in place of ``python main.py ARGUMENTS``. All else is
the product: the model's folder is really inspected, requests are checked against it, and a text of the demo's
form is painted as that scene, so that the demo's judge recognises which prompt an image belongs to.

Environment variables:

- SLEEP_PER_IMAGE: seconds (0.02);
- SLEEP_HOLD: where a worker stands still until the file ``go`` appears in the working directory: ``load``,
  while it loads its weights, or the number of one of its batches, counted from 1, held as by ``hold``;
- LOCKED_MARGIN: seconds in place of the watchdog's own;
- PAINT_GREY: if set, no image shows what its prompt asks for.

A prompt's text may hold one of these words:

- ``kill``: its worker's process ends by SIGKILL while the prompt is on the device;
- ``break one``, ``break all``: the device fails under the first worker that has it, or under each;
- ``hang``: the device makes no step any more;
- ``block``: the device's thread never returns from a call into C, which begins once the file ``blocked`` has
  appeared in the working directory; with ``block locked`` it holds the interpreter's lock as well, and
  ``block for 3`` returns after so many seconds, and blocks no more once the file ``go`` is there;
- ``hold``: the device goes on with steps, and does not finish them until the file ``release`` appears in the
  working directory; ``hold from 2`` does so for a prompt's third image and those after it. A caption with
  this word beside it is painted as the caption's scene;
- ``step by step``: the device goes on after so many steps with the prompt once the file ``ID.steps`` in the
  working directory holds a larger number.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import resource
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":  # as a script: the checkout is what can be imported, not this folder
    sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402 - after the path is set
from PIL import Image  # noqa: E402

from text2img import cli  # noqa: E402
from text2img.demo.scenes import Scene, draw  # noqa: E402
from text2img.engine import GeneratedImage, ModelInfo, diffusers  # noqa: E402
from text2img.engine.inspection import fit  # noqa: E402
from text2img.errors import DeviceFailed  # noqa: E402
from text2img.settings import DEFAULT_MODEL  # noqa: E402
from text2img.worker import watchdog  # noqa: E402
from text2img.worker.ray import pool, remote  # noqa: E402

_CARD = ModelInfo(
    name="sleeping", revision=None, family="sleeping", width=64, height=64, multiple=8,
    scheduler="none", schedulers=(),
)  # fmt: skip
_POLL_INTERVAL = 0.01  # seconds
_HOLD = r"hold(?: from (\d+))?"
_BLOCK_FOR = r"block for (\d+)"
_COARSEST = 32  # levels by which a pixel may differ from what was painted; the judge sees through it


class SleepingEngine(diffusers.DiffusersEngine):
    """Inspects as the real engine does, and neither loads nor draws.

    Without a model of the run's own, which no test could fetch, it takes any request.
    """

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self._made = Counter()

    def inspect(self) -> ModelInfo:
        return _CARD if self._options.model == DEFAULT_MODEL else super().inspect()

    def load(self) -> None:
        with self._timed("load"):
            time.sleep(_POLL_INTERVAL)  # clock: long enough to be reported
            while self._holds("load"):
                time.sleep(_POLL_INTERVAL)  # clock: weights that load for as long as a test wants
            self._loaded, self._batches = None, 0

    def prepare(self, request):
        return replace(fit(self.inspect(), request), chunks=1)

    def warm_up(self, batch, remaining) -> None:
        pass

    def generate(self, batch, on_step):
        self._batches += 1
        with self._timed("denoise"):
            for request in batch:
                _obey(request.text)
            self._sleep(batch, on_step)
        used = batch[0].parameters.scheduler or self.inspect().scheduler
        with self._timed("decode"):
            time.sleep(_POLL_INTERVAL)  # clock: as above
            return [GeneratedImage(pixels=_painted(request), scheduler=used) for request in batch]

    def peak_memory(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def close(self) -> None:
        pass

    def _sleep(self, batch, on_step):
        """Take the device's time, in as many steps as were asked for."""
        steps = batch[0].parameters.num_inference_steps
        seconds = float(os.environ.get("SLEEP_PER_IMAGE", "0.02")) * len(batch) / steps
        held = any(_is_held(request) for request in batch)
        slow = {str(request.prompt.id) for request in batch if "step by step" in request.text}
        for step in range(1, steps + 1):
            time.sleep(seconds)  # clock: it is what this engine is for
            on_step(step, steps)
            while self._holds(str(self._batches)) or (held and not Path("release").exists()):
                time.sleep(_POLL_INTERVAL)  # clock: a step of the device
                on_step(step, steps)
            self._made.update(slow)
            while any(_granted(prompt) <= self._made[prompt] for prompt in slow):
                time.sleep(_POLL_INTERVAL)  # clock: the device waits for the test

    def _holds(self, point):
        """Say whether this worker has to stand still at a point of its work."""
        return os.environ.get("SLEEP_HOLD") == point and not Path("go").exists()


def paint(text, seed, steps, size):
    """The scene that the text describes, else a grey of its own; uint8 (height, width, 3).

    As from a real engine, other steps make another image of the same seed: fewer leave a coarser grain.
    ``size`` is width and height in pixels.
    """
    if (scene := _scene(text)) is not None:
        image = draw(scene, Random(seed)).resize(size, Image.Resampling.LANCZOS)
    else:
        shade = hashlib.sha256(f"{text}\0{seed}".encode()).digest()[0]
        image = Image.new("RGB", size, (shade, shade, shade))
    pixels = np.asarray(image)
    coarse = min(_COARSEST, 64 // steps)
    grain = np.random.default_rng(seed).integers(-coarse, coarse + 1, pixels.shape[:2])
    return np.clip(pixels + grain[..., None], 0, 255).astype(np.uint8)


def _painted(request):
    wanted = request.parameters
    return paint(request.text, wanted.seed, wanted.num_inference_steps, (wanted.width, wanted.height))


def _scene(text):
    """The scene to paint, None where there is none."""
    try:
        return (
            None if os.environ.get("PAINT_GREY") else Scene.parse(re.sub(f"{_HOLD}|{_BLOCK_FOR}", "", text))
        )
    except ValueError:
        return None


def _is_held(request):
    """Say whether the request's text has its image wait for the file ``release``."""
    found = re.search(_HOLD, request.text)
    return bool(found) and request.number >= int(found[1] or 0)


def _obey(text):
    """Do what the words of a prompt ask of the device."""
    if "kill" in text:
        os.kill(os.getpid(), signal.SIGKILL)
    if "hang" in text:
        threading.Event().wait()
    if found := re.search(_BLOCK_FOR, text):
        if not Path("go").exists():
            _block_for(int(found[1]))
    elif "block" in text:
        _block(ctypes.PyDLL if "locked" in text else ctypes.CDLL)
    if "break all" in text or ("break one" in text and _is_first()):
        raise DeviceFailed("the device is broken")


def _block(library):
    """Lock a lock of the C library's twice: no signal interrupts that."""
    lock = ctypes.create_string_buffer(64)
    library(None).pthread_mutex_lock(lock)
    Path("blocked").touch()
    library(None).pthread_mutex_lock(lock)


def _block_for(seconds):
    """As ``_block``, for so long."""
    lock, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    library.pthread_mutex_lock(lock)
    Path("blocked").touch()
    until = time.clock_gettime(time.CLOCK_REALTIME) + seconds
    moment = (ctypes.c_long * 2)(int(until), int(until % 1 * 1e9))
    library.pthread_mutex_timedlock(lock, moment)  # clock: a call that takes as long as the test asks


def _granted(prompt):
    """Return the number in the prompt's file of steps; 0 while there is none."""
    try:
        return int(Path(f"{prompt}.steps").read_text() or 0)
    except FileNotFoundError:
        return 0


def _is_first():
    """Say whether no worker has asked before, in this folder."""
    try:
        Path("broken").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def work(spec, channel):
    """What a worker's process runs; Ray starts it and imports this module by its name."""
    with patch.object(diffusers, "DiffusersEngine", SleepingEngine):
        remote.work(spec, channel)


def main():
    from tests.fakes import sleeping  # by its name, not as __main__: the workers import it

    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )  # the workers' too
    with (
        patch.object(pool, "work", sleeping.work),
        patch.object(watchdog, "LOCKED_MARGIN", float(os.environ.get("LOCKED_MARGIN", "30"))),
        patch.object(diffusers, "DiffusersEngine", sleeping.SleepingEngine),
    ):
        return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
