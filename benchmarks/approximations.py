"""What each approximation saves and what it changes, on the CPU with the demo model.

Every contestant draws the same prompts with the same seeds through the engine; batch by batch they take
turns, so that a busy machine slows all of them. Time is the processor time of one thread, without loading.
Differences are those from the plain pictures; the judge, which looks at pixels alone, says what they show.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from benchmarks.results import RESULTS, Check, Result, report
from benchmarks.similarity import mean_difference, psnr, ssim
from text2img.engine import EngineOptions, GeneratedImage
from text2img.engine.diffusers import DiffusersEngine
from text2img.prompts import Claim, Prompt, PromptId, RequestedParameters, request
from training.evaluate import FIRST_SEED, MODEL, choose_scenes, measure
from training.shortcuts import FEW_STEPS, TINY

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from text2img.demo.scenes import Scene

BATCH = 8
RIGHT = 0.9
"""The least part of pictures that must show what was asked for."""
_SEEN = ("colour", "shape", "background", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A way of drawing. ``checked``: whether its pictures must be right."""

    name: str
    steps: int = 20
    guidance: float = 3.0
    scheduler: str | None = None
    model: Path = MODEL
    options: dict[str, Any] = field(default_factory=dict)
    checked: bool = True

    def engine(self) -> DiffusersEngine:
        """The engine that draws so, loaded, on the CPU in fp32."""
        engine = DiffusersEngine(EngineOptions(model=str(self.model), device="cpu", **self.options))
        engine.load()
        return engine

    @property
    def requested(self) -> RequestedParameters:
        """The parameters of all its pictures."""
        return RequestedParameters(
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            scheduler=self.scheduler,
            width=128,
            height=128,
        )


@dataclass(slots=True)
class Drawn:
    """What a contestant has drawn so far, and the processor seconds it took."""

    seconds: float = 0.0
    pictures: list[Any] = field(default_factory=list)


CONTESTANTS = (
    Contestant(name="plain"),
    Contestant(name="feature cache 2", options={"feature_cache": 2}),
    Contestant(name="feature cache 3", options={"feature_cache": 3}),
    Contestant(name="feature cache 5", options={"feature_cache": 5}),
    Contestant(name="tiny autoencoder", options={"autoencoder": str(TINY)}),
    Contestant(
        name="feature cache 3, tiny autoencoder", options={"feature_cache": 3, "autoencoder": str(TINY)}
    ),
    Contestant(name="few-step model", steps=4, guidance=1, scheduler="lcm", model=FEW_STEPS),
    Contestant(name="few-step model", steps=1, guidance=1, scheduler="lcm", model=FEW_STEPS),
    Contestant(name="plain, fewer steps", steps=10, checked=False),
    Contestant(name="plain, fewer steps", steps=4, checked=False),
    Contestant(name="plain, fewer steps", steps=2, checked=False),
)


def draw(engine: DiffusersEngine, contestant: Contestant, scenes: Sequence[Scene], first: int) -> list[Any]:
    """The pixels, uint8 (128, 128, 3), of scenes ``first`` and on."""
    prompts = [
        Prompt(
            claim=Claim(PromptId("int", str(n)), "bench", 1),
            text=scene.caption,
            requested=RequestedParameters(seed=n),
        )
        for n, scene in enumerate(scenes, FIRST_SEED + first)
    ]
    batch = [engine.prepare(request(prompt, [contestant.requested])) for prompt in prompts]
    results = engine.generate(batch, lambda _done, _of: None)
    return [result.pixels for result in results if isinstance(result, GeneratedImage)]


def compete(contestants: Sequence[Contestant], scenes: Sequence[Scene]) -> list[Drawn]:
    """Let all draw all scenes in turns, after a batch each that does not count."""
    engines = [contestant.engine() for contestant in contestants]
    drawn = [Drawn() for _ in contestants]
    for turn in range(-1, math.ceil(len(scenes) / BATCH)):
        first = max(turn, 0) * BATCH
        part = scenes[first : first + BATCH]
        for engine, contestant, so_far in zip(engines, contestants, drawn, strict=True):
            begun = time.process_time()
            pictures = draw(engine, contestant, part, first)
            if turn >= 0:
                so_far.seconds += time.process_time() - begun
                so_far.pictures += pictures
    return drawn


def rows(
    contestants: Sequence[Contestant], drawn: Sequence[Drawn], seen: Sequence[Mapping[str, float]]
) -> Iterator[dict[str, object]]:
    """A row a contestant; the first is what the others are compared with. ``seen``: the judge's shares."""
    plain = drawn[0]
    for contestant, its, shown in zip(contestants, drawn, seen, strict=True):
        pairs = list(zip(its.pictures, plain.pictures, strict=True))
        noise = fmean(psnr(*pair) for pair in pairs)
        yield {
            "approximation": contestant.name,
            "steps": contestant.steps,
            "images/s ÷ plain": round(plain.seconds / its.seconds, 2),
            "mean difference": round(fmean(mean_difference(*pair) for pair in pairs), 2),
            "PSNR, dB": round(noise, 1) if math.isfinite(noise) else "∞",
            "SSIM": round(fmean(ssim(*pair) for pair in pairs), 4),
            **{f"{name} right": f"{shown[name]:.1%}" for name in _SEEN},
        }


def benchmark(contestants: Sequence[Contestant], prompts: int, *, rehearsal: bool = False) -> Result:
    """Draw ``prompts`` pictures by each contestant and compare them."""
    torch.set_num_threads(1)
    scenes = choose_scenes(prompts)
    return compared(contestants, scenes, compete(contestants, scenes), rehearsal=rehearsal)


def compared(
    contestants: Sequence[Contestant], scenes: Sequence[Scene], drawn: Sequence[Drawn], *, rehearsal: bool
) -> Result:
    """What the contestants have drawn of the scenes, compared with the first one's."""
    seen = [measure(scenes, map(Image.fromarray, its.pictures)) for its in drawn]
    checks = [
        Check(
            figure=f"right in every attribute: {contestant.name}, {contestant.steps} steps",
            measured=shown["all"],
            target=RIGHT,
        )
        for contestant, shown in zip(contestants, seen, strict=True)
        if contestant.checked
    ]
    return Result(
        benchmark="approximations",
        checks=checks,
        settings={"prompts": len(scenes), "batch": BATCH, "size": 128, "guidance": 3.0, "dtype": "fp32"},
        rows=list(rows(contestants, drawn, seen)),
        note="The demo model of 3.7 million parameters, 128 × 128 pixels, on one thread of a CPU.",
        details={"plain_images_per_processor_second": round(len(scenes) / drawn[0].seconds, 2)},
        rehearsal=rehearsal,
    )


def main() -> int:
    """Read the options, measure, print, save."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.approximations", description=__doc__)
    parser.add_argument("--prompts", type=int, default=104, help="pictures by each (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    there = [contestant for contestant in CONTESTANTS if contestant.model.is_dir()]
    if len(there) < len(CONTESTANTS):
        print(f"{FEW_STEPS} is missing, so few steps are left out: python -m training.shortcuts few-steps")
    result = benchmark(there, options.prompts, rehearsal=options.prompts < 100)
    result.save(options.output)
    print(report(result))
    return result.status


if __name__ == "__main__":
    raise SystemExit(main())
