"""The loop that diffusers' documentation shows: load, generate a batch, save its images, and the next.

python plain_loop.py MODEL PROMPTS.jsonl FOLDER BATCH STEPS
"""

import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

model, prompts_file, folder, batch, steps = sys.argv[1:]
prompts = [json.loads(line) for line in Path(prompts_file).read_text(encoding="utf-8").splitlines()]
pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
for start in range(0, len(prompts), int(batch)):
    part = prompts[start : start + int(batch)]
    images = pipe(
        [prompt["text"] for prompt in part],
        num_inference_steps=int(steps),
        generator=[torch.Generator("cpu").manual_seed(prompt["seed"]) for prompt in part],
    ).images
    for prompt, image in zip(part, images, strict=True):
        image.save(Path(folder) / f"{prompt['id']}.png")
