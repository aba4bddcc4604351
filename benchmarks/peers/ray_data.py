"""Batch inference as Ray Data's guide shows it: a class that holds the model, and ``map_batches``.

python ray_data.py MODEL PROMPTS.jsonl FOLDER BATCH STEPS
"""

import json
import sys
from pathlib import Path
from typing import Any

import ray

model, prompts_file, folder, batch, steps = sys.argv[1:]


class Generator:
    """Generates and saves the images of a batch of rows."""

    def __init__(self) -> None:
        import torch
        from diffusers import DiffusionPipeline

        torch.set_num_threads(1)
        self.pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
        self.pipe.set_progress_bar_config(disable=True)

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Generate the images of one batch, a row each."""
        import torch

        images = self.pipe(
            list(rows["text"]),
            num_inference_steps=int(steps),
            generator=[torch.Generator("cpu").manual_seed(int(seed)) for seed in rows["seed"]],
        ).images
        for name, image in zip(rows["id"], images, strict=True):
            image.save(Path(folder) / f"{name}.png")
        return {"id": rows["id"]}


prompts = [json.loads(line) for line in Path(prompts_file).read_text(encoding="utf-8").splitlines()]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
ray.data.DataContext.get_current().enable_progress_bars = False
ray.data.from_items(prompts).map_batches(
    Generator, batch_size=int(batch), compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1
).materialize()
