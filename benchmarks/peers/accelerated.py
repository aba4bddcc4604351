"""The loop of accelerate's guide to distributed inference, with its one process a device.

python accelerated.py MODEL PROMPTS.jsonl FOLDER BATCH STEPS
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

model, prompts_file, folder, batch, steps = sys.argv[1:]
prompts = [json.loads(line) for line in Path(prompts_file).read_text(encoding="utf-8").splitlines()]
state = PartialState(cpu=True)
pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32).to(state.device)
pipe.set_progress_bar_config(disable=True)
with state.split_between_processes(prompts) as share:
    for start in range(0, len(share), int(batch)):
        part = share[start : start + int(batch)]
        images = pipe(
            [prompt["text"] for prompt in part],
            num_inference_steps=int(steps),
            generator=[torch.Generator("cpu").manual_seed(prompt["seed"]) for prompt in part],
        ).images
        for prompt, image in zip(part, images, strict=True):
            image.save(Path(folder) / f"{prompt['id']}.png")
