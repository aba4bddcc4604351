"""The finished folder: the trained parts as one StableDiffusionPipeline in half precision."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline

from training.diffusion import build_scheduler

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


def hush() -> None:
    """No progress bars and no hints from the libraries: what is printed here is figures."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def assemble(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, vae: AutoencoderKL
) -> StableDiffusionPipeline:
    """The parts as a pipeline, without a safety checker: the demo's world holds nothing to check for."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write the pipeline as half-precision safetensors, with no trace of where it was made."""
    save_part(pipeline, folder)


def save_part(part: StableDiffusionPipeline | AutoencoderTiny, folder: Path) -> None:
    """The same for whatever has such a folder."""
    part.to(torch.float16).save_pretrained(folder)
    for file in folder.rglob("*.*"):
        file.chmod(0o644)  # safetensors writes its files for the owner's eyes only
    for config in folder.rglob("*.json"):
        content = json.loads(config.read_text())
        if content.pop("_name_or_path", None) is not None:
            config.write_text(json.dumps(content, indent=2) + "\n")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """The saved pipeline, silent and on the CPU."""
    hush()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
