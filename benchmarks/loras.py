"""Does switching LoRAs cost pace? Prompts that alternate over three, against as many that all want one.

The job itself, ``python main.py run``, with the demo model on one thread of the CPU, SQLite and a folder. The
two kinds take turns, ``--rounds`` times, the one that begins changing; pictures a second are the run's own,
from the first batch's start to the last record. The LoRAs are those of training/styles.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.job import clean_environment
from benchmarks.places import places
from benchmarks.results import RESULTS, Check, Result, report
from text2img.databases import Collections, NewPrompt, open_database
from text2img.demo.scenes import all_scenes
from text2img.prompts import PromptId, RequestedParameters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.places import Place

ROOT = Path(__file__).parents[1]
PRODUCT = ROOT / "main.py"
LORAS = sorted((ROOT / "training" / "styles").glob("*.safetensors"))
"""Three, for the demo model."""


def add(place: Place, prompts: int, loras: Sequence[Path]) -> None:
    """Let so many prompts wait, each for the next of the LoRAs in turn."""
    captions = [scene.caption for scene in all_scenes()]
    with closing(open_database(place.near, Collections())) as database:
        database.runs.enqueue(
            NewPrompt(
                id=PromptId("int", str(number)),
                text=captions[number % len(captions)],
                requested=RequestedParameters(seed=number, lora={"path": str(loras[number % len(loras)])}),
            )
            for number in range(prompts)
        )


def pace(place: Place, prompts: int, steps: int, script: Path = PRODUCT) -> float:
    """Pictures a second of a run over what waits at the place. Raises RuntimeError unless all were made.

    ``script`` is what is started as the product.
    """
    command = [sys.executable, str(script), "run", *place.arguments, "--run-id", "measured"]
    command += ["--model-id", str(ROOT / "text2img/demo/model"), "--lora-source", str(LORAS[0].parent)]
    command += ["--num-inference-steps", str(steps), "--device", "cpu"]
    done = subprocess.run(
        command,
        env={**clean_environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the run ended with status {done.returncode}: {done.stderr[-1000:]}")
    with closing(open_database(place.near, Collections(), create=False)) as database:
        run = database.runs.run("measured")
    if run is None or run.completed != prompts:
        raise RuntimeError(f"not all of the prompts were made: {run}")
    return run.images_per_second


def measure(prompts: int, steps: int, rounds: int, script: Path = PRODUCT) -> list[dict[str, Any]]:
    """Each round's pace with one LoRA and with three in turn."""
    rows = []
    kinds = {"one LoRA images/s": LORAS[:1], "three LoRAs images/s": LORAS[:3]}
    with places("sqlite", "folder") as place:
        for number in range(1, rounds + 1):
            row: dict[str, Any] = {"round": number}
            for name, loras in list(kinds.items())[:: 1 if number % 2 else -1]:
                here = place()
                add(here, prompts, loras)
                row[name] = pace(here, prompts, steps, script)
            row["three ÷ one"] = row["three LoRAs images/s"] / row["one LoRA images/s"]
            rows.append(row)
    return rows


def result(prompts: int, steps: int, rows: Sequence[dict[str, Any]]) -> Result:
    """The median of the rounds' ratios against the target."""
    return Result(
        benchmark="loras",
        checks=[
            Check(
                figure="prompts alternating over three LoRAs ÷ prompts with one, images/s",
                measured=median(float(row["three ÷ one"]) for row in rows),
                target=0.9,
            )
        ],
        settings={"prompts": prompts, "steps": steps, "rounds": len(rows), "model": "demo", "device": "cpu"},
        rows=list(rows),
        note="Median of the rounds' ratios. Other work on the cores meets a round's two runs differently.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, keep; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loras", description=__doc__)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args(argv)
    outcome = result(asked.prompts, asked.steps, measure(asked.prompts, asked.steps, asked.rounds))
    print(report(outcome))
    outcome.save(asked.results)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main())
