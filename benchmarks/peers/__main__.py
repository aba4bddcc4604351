"""The job against what a user would write or pick instead: ``python -m benchmarks.peers``.

Every contestant generates the same prompts with the same model, batch and steps, on one thread, as a whole
process; all take turns, and the order is reversed each round. Steady images/s are from the end of the first
batch to the last image, by the times of the files; the whole process is from its start to its end. The best
of the rounds counts: at least ``--rounds`` of them, and more until each contestant's two best agree within
5 %, up to ``--max-rounds``. Before that the job's images are compared with the loop's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.job import clean_environment
from benchmarks.results import RESULTS, Check, Result, report

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_MODEL = _ROOT / "text2img" / "demo" / "model"
_LOOP = "plain loop"
_JOB = "this job, SQLite and folder"
_AGREE = 0.05
"""How far apart the two best of a contestant may be, as a share of the best."""
_STEADY, _WHOLE = 0.97, 0.95
_WORDS = ("a red circle", "a blue square", "a green triangle", "a yellow star")


@dataclass(frozen=True, slots=True)
class Task:
    """What every contestant generates."""

    images: int
    batch: int
    steps: int
    model: Path = _MODEL


@dataclass(frozen=True, slots=True)
class Contest:
    """One contestant's process: its command, its variables, and where its images appear."""

    command: Sequence[str]
    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds of the whole process, and images a second between the first batch and the last image.

    ``steady`` is None where all images appear at once.
    """

    whole: float
    steady: float | None


Prepare = Callable[[Task, Path], Contest]
"""Makes an empty folder ready; none of this is timed."""


def write_prompts(task: Task, folder: Path) -> Path:
    """Write the prompts as JSON lines: an id, a text, a seed."""
    file = folder / "prompts.jsonl"
    lines = [
        json.dumps({"id": f"p{n:04}", "text": f"{_WORDS[n % len(_WORDS)]}, number {n}", "seed": n})
        for n in range(task.images)
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def script(name: str) -> Prepare:
    """Return what prepares one of the scripts beside this module."""

    def prepare(task: Task, folder: Path) -> Contest:
        images = folder / "images"
        images.mkdir()
        arguments = (task.model, write_prompts(task, folder), images, task.batch, task.steps)
        return Contest([sys.executable, str(_HERE / name), *map(str, arguments)], images)

    return prepare


def diffusers_cli(task: Task, folder: Path) -> Contest:
    """One call of ``diffusers-cli run``, which makes one batch of everything."""
    images = folder / "images"
    images.mkdir()
    texts = [json.loads(line)["text"] for line in write_prompts(task, folder).read_text().splitlines()]
    call = json.dumps({"prompt": texts, "num_inference_steps": task.steps})
    program = str(Path(sys.executable).with_name("diffusers-cli"))
    where = ["--device-map", "cpu", "--dtype", "fp32", "--seed", "1", "--output", str(images)]
    return Contest([program, "run", "--model", str(task.model), *where, "--pipeline-kwargs", call], images)


def job_with(database: str, output: str, images: Path | None = None, **variables: str) -> Prepare:
    """Return what prepares this job: prompts are enqueued first, and ``run`` is timed.

    ``{folder}`` in the URLs is the contest's own folder, ``{name}`` a name of its own.
    """

    def prepare(task: Task, folder: Path) -> Contest:
        prompts = write_prompts(task, folder)
        place = {"folder": folder, "name": folder.name}
        arguments = ["--database", database.format(**place)]
        environment = _environment(variables)
        _run([*_main(), "enqueue", str(prompts), *arguments], folder, environment)
        target = output.format(**place)
        command = [*_main(), "run", *arguments, "--output", target, *_generation(task)]
        return Contest(command, images or Path(target), variables)

    return prepare


def file_to_folder(task: Task, folder: Path) -> Contest:
    """This job as the local pipeline: a prompt file in, a folder out."""
    images = folder / "images"
    arguments = ["--input-file", str(write_prompts(task, folder)), "--output-dir", str(images)]
    return Contest([*_main(), "run", *arguments, "--layout", "flat", *_generation(task)], images)


def _main() -> list[str]:
    return [sys.executable, str(_ROOT / "main.py")]


def _generation(task: Task) -> list[str]:
    batch = ["--batch-size", str(task.batch), "--num-inference-steps", str(task.steps)]
    return ["--model-id", str(task.model), *batch, "--log-format", "json"]


def contestants(servers: ExitStack, folder: Path) -> dict[str, Prepare | str]:
    """Return what prepares each contestant, or why it cannot take part. Servers end with the stack."""
    found: dict[str, Prepare | str] = {
        _LOOP: script("plain_loop.py"),
        "Accelerate": script("accelerated.py"),
        "Ray Data": script("ray_data.py") if find_spec("pandas") and find_spec("pyarrow") else "no pandas",
        "diffusers-cli": diffusers_cli,
        _JOB: job_with("sqlite:///{folder}/prompts.db", "{folder}/images"),
        "this job, file in and folder out": file_to_folder,
    }
    from tests.servers.gcs import gcs_in
    from tests.servers.mongodb import mongodb_in

    uri = servers.enter_context(mongodb_in(folder / "mongodb"))
    bucket = servers.enter_context(gcs_in(folder / "gcs"))
    found["this job, MongoDB and bucket"] = job_with(
        uri + "/{name}?directConnection=true",
        f"gs://{bucket.bucket}/{{name}}",
        folder / "gcs" / "data",
        STORAGE_EMULATOR_HOST=bucket.host,
    )
    return found


def run_once(prepare: Prepare, task: Task, folder: Path) -> Pace:
    """Time one contestant in a new folder. Raises RuntimeError if it fails or images are missing."""
    folder.mkdir()
    contest = prepare(task, folder)
    begun = time.time()
    _run(contest.command, folder, _environment(contest.variables))
    whole = time.time() - begun
    times = sorted(_times(contest.folder, begun))
    if len(times) != task.images:
        raise RuntimeError(f"{len(times)} images instead of {task.images}: {' '.join(contest.command)[:200]}")
    first, last = times[task.batch - 1], times[-1]
    return Pace(whole, (task.images - task.batch) / (last - first) if last - first > 1 else None)


def _times(folder: Path, begun: float) -> list[float]:
    """Return when each image was written; a bucket's emulator keeps no suffix, and its own files beside."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_mtime >= begun]
    return [file.stat().st_mtime for file in files if _is_png(file)]


def _is_png(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"\x89PNG"


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return one thread for every contestant, and no hub."""
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**clean_environment(), **one, "PYTHONWARNINGS": "ignore", **variables}


def _run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
    log = folder / "log.txt"
    with log.open("a", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=file, stderr=file, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[1]} ended with {done.returncode}: {log.read_text()[-1000:]}")


def largest_difference(one: Path, other: Path) -> int:
    """Return the largest difference of a value, of 255, between the images of the same names."""
    names = sorted(file.name for file in one.glob("*.png"))
    if not names or names != sorted(file.name for file in other.glob("*.png")):
        raise RuntimeError(f"{one} and {other} hold different images")
    return max(
        int(np.abs(_pixels(one / name).astype(int) - _pixels(other / name).astype(int)).max())
        for name in names
    )


def _pixels(file: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def compare(task: Task, folder: Path) -> dict[int, int]:
    """Return, by batch size, how far the job's images are from the plain loop's."""
    differences = {}
    loop, job = script("plain_loop.py"), job_with("sqlite:///{folder}/prompts.db", "{folder}/images")
    for batch in (1, task.batch):
        small = Task(min(task.images, 2 * task.batch), batch, task.steps, task.model)
        folders = [folder / f"equal-{name}-{batch}" for name in ("loop", "job")]
        for each, prepare in zip(folders, (loop, job), strict=True):
            run_once(prepare, small, each)
        differences[batch] = largest_difference(*(each / "images" for each in folders))
    return differences


def measure(
    field_: Mapping[str, Prepare], task: Task, folder: Path, rounds: int, max_rounds: int
) -> dict[str, list[Pace]]:
    """Let all take turns until each one's two best agree, or ``max_rounds`` have been run."""
    paces: dict[str, list[Pace]] = {name: [] for name in field_}
    numbers = count()
    for turn in range(max_rounds):
        for name in list(field_)[:: -1 if turn % 2 else 1]:
            own = folder / f"contest-{next(numbers)}"
            paces[name].append(run_once(field_[name], task, own))
            shutil.rmtree(own)
        print(f"round {turn + 1}: " + "; ".join(f"{name} {p[-1].whole:.1f} s" for name, p in paces.items()))
        if turn + 1 >= rounds and all(map(settled, paces.values())):
            break
    return paces


def settled(paces: Sequence[Pace]) -> bool:
    """Return True if the two best agree, of the whole process and of the steady pace."""
    whole = sorted(pace.whole for pace in paces)
    steady = sorted((pace.steady for pace in paces if pace.steady is not None), reverse=True)
    pairs = [(whole[1], whole[0])] if len(whole) > 1 else []
    pairs += [(steady[0], steady[1])] if len(steady) > 1 else []
    return bool(pairs) and all(large <= small * (1 + _AGREE) for large, small in pairs)


def result(
    task: Task, paces: Mapping[str, Sequence[Pace]], differences: Mapping[int, int], absent: Mapping[str, str]
) -> Result:
    """Return the best of each, and the job's against the loop's and the others'."""
    best = {name: _best(each) for name, each in paces.items()}
    loop, job = best[_LOOP], best[_JOB]
    peers = [name for name in best if not name.startswith("this job") and name != _LOOP]
    checks = [
        Check(figure="steady images/s, the job ÷ the plain loop", measured=_ratio(job, loop), target=_STEADY),
        Check(
            figure="whole process, the plain loop's seconds ÷ the job's",
            measured=loop.whole / job.whole,
            target=_WHOLE,
        ),
        *(
            Check(
                figure=f"whole process, {name}'s seconds ÷ the job's",
                measured=best[name].whole / job.whole,
                target=1.0,
            )
            for name in peers
        ),
        *(
            Check(
                figure=f"largest difference from the plain loop's images at batch {batch}, of 255",
                measured=difference,
                target=0 if batch == 1 else 1,
                at_least=False,
            )
            for batch, difference in differences.items()
        ),
    ]
    rows = [
        {
            "contestant": name,
            "images/s, steady": "all at once" if each.steady is None else f"{each.steady:.1f}",
            "seconds, whole process": f"{each.whole:.1f}",
            "rounds": len(paces[name]),
        }
        for name, each in best.items()
    ]
    return Result(
        benchmark="peers",
        checks=checks,
        settings={"images": task.images, "batch": task.batch, "steps": task.steps, "absent": dict(absent)},
        rows=rows,
        note="One thread each. The servers of MongoDB and the bucket share the machine with the job.",
        details={"paces": {name: [[p.whole, p.steady] for p in each] for name, each in paces.items()}},
    )


def _best(paces: Sequence[Pace]) -> Pace:
    steady = [pace.steady for pace in paces if pace.steady is not None]
    return Pace(min(pace.whole for pace in paces), max(steady) if steady else None)


def _ratio(one: Pace, other: Pace) -> float:
    return one.steady / other.steady if one.steady and other.steady else float("nan")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, keep; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-rounds", type=int, default=7)
    parser.add_argument("--only", action="append", help="contestants, by the beginning of their names")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(argv)
    task = Task(asked.images, asked.batch, asked.steps)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="text2img-peers-")))
        found = contestants(stack, folder)
        if asked.only:
            found = {name: each for name, each in found.items() if name.startswith((_LOOP, *asked.only))}
        absent = {name: each for name, each in found.items() if isinstance(each, str)}
        taking_part = {name: each for name, each in found.items() if not isinstance(each, str)}
        for name, reason in absent.items():
            print(f"{name} takes no part: {reason}")
        differences = compare(task, folder)
        paces = measure(taking_part, task, folder, asked.rounds, asked.max_rounds)
    outcome = result(task, paces, differences, absent)
    print(report(outcome))
    outcome.save(asked.results)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
