"""Options that say how pictures are made and judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from text2img.prompts.refinement import MOST_CANDIDATES, MOST_ITERATIONS
from text2img.prompts.requested import Wishes
from text2img.settings.endpoints import Places
from text2img.settings.option import option

DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
DEFAULTS = Wishes(num_inference_steps=50, guidance_scale=7.5)
"""What a picture gets where nobody wishes otherwise; its size is the model's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing(Places):
    """Model, generator, parameters, what is done to the pixels, and the evaluator."""

    model_config_id: str | None = option(
        None,
        "model",
        "the model configuration to use, by _id; else the first with model_type stable_diffusion",
    )
    model_id: str | None = option(
        None,
        "model",
        "hub id, folder, gs://… or s3://… of the model; beats the model configuration's",
        shown=DEFAULT_MODEL,
    )
    model_revision: str | None = option(None, "model", "pins a hub revision")
    model_cache: str | None = option(
        None,
        "model",
        "folder that keeps models from buckets for later runs",
        shown="~/.cache/text2img/models",
    )
    device: Literal["auto", "cuda", "mps", "cpu"] = option("auto", "model", "auto, cuda, mps or cpu")
    dtype: Literal["auto", "fp16", "bf16", "fp32"] = option(
        "auto", "model", "auto (fp16 on a GPU, fp32 on the CPU), fp16, bf16 or fp32"
    )
    compile: Literal["auto", "always", "never"] = option(
        "auto",
        "model",
        "compile the denoiser: auto (on a GPU, where the run is long enough), always or never",
    )
    compile_cache: str | None = option(
        None, "model", "folder that keeps what was compiled and measured for later runs; may be a volume"
    )
    offload: Literal["none", "model", "sequential"] = option(
        "none",
        "model",
        "for small cards, weights wait in the host's memory: none, model (a part at a time is on the device) "
        "or sequential (a layer at a time: slow)",
    )
    feature_cache: Annotated[int, Ge(0), Le(1000)] | None = option(
        None,
        "model",
        "an approximation: compute the deep part of a UNet at every N-th step only (from 2 on)",
        shown="0",
    )
    autoencoder: str | None = option(
        None,
        "model",
        "an approximation: folder or hub id of a tiny autoencoder that decodes instead of the model's own",
    )
    lora_source: str | None = option(
        None,
        "model",
        "where LoRAs may come from, with commas between: a folder, hub:, hub:OWNER/, gs://BUCKET/PREFIX/, "
        "s3://BUCKET/PREFIX/, https://HOST/PATH/",
        shown="nowhere",
    )
    lora_cache: str | None = option(
        None, "model", "folder that keeps fetched LoRAs for later runs", shown="~/.cache/text2img/loras"
    )
    lora_cache_size: Annotated[float, Gt(0), Le(100_000)] = option(
        10, "model", "GB that it may hold; the least recently used go first"
    )

    generator: str = option(
        "local", "generator", "local, or fal:MODEL: a model that fal hosts, such as fal:fal-ai/flux/dev"
    )
    generator_url: str | None = option(
        None, "generator", "the URL of another service that speaks like the generator's", shown="fal's own"
    )
    generator_patience: Annotated[float, Gt(0), Le(86_400)] = option(
        60, "generator", "seconds that a run goes on asking a hosted generator that does not answer"
    )
    fal_ai_api_key: str | None = option(
        None, "generator", "the key for fal; FAL_KEY says the same", secret=True, also=("FAL_KEY",)
    )

    num_inference_steps: int | None = option(
        None, "generation", "denoising steps", shown=str(DEFAULTS.num_inference_steps)
    )
    guidance_scale: float | None = option(
        None, "generation", "how closely to follow the text", shown=str(DEFAULTS.guidance_scale)
    )
    width: int | None = option(None, "generation", "pixels", shown="the model's own")
    height: int | None = option(None, "generation", "pixels", shown="the model's own")
    aspect_ratio: str | None = option(
        None, "generation", "1:1, 2:2, 1:2, 2:1, 3:2, 2:3, 4:3, 3:4, 16:9 or 9:16, of the model's own size"
    )
    num_images: int | None = option(
        None, "generation", "pictures of each prompt (1 … 100), with seed, seed + 1, …", shown="1"
    )
    scheduler: str | None = option(
        None,
        "generation",
        "dpm++, euler, euler-a, ddim, unipc, pndm, heun or lcm",
        shown="the model's own",
    )
    negative_prompt: str | None = option(None, "generation", "what the pictures shall not show")
    seed: int | None = option(
        None,
        "generation",
        "for prompts without a seed of their own; else one derived from the prompt's _id, the same for ever",
    )

    artist_name: str | None = option(
        None, "picture", "signs the pictures of prompts without an artist_name of their own"
    )
    signature_position: str | None = option(
        None, "picture", "bottom-right or bottom-left", shown="bottom-right"
    )
    signature_opacity: int | None = option(
        None, "picture", "0 (not to be seen) … 255 (hides what is below)", shown="128"
    )
    signature_font: str | None = option(
        None,
        "picture",
        "a TrueType or OpenType font's file, for names in other scripts",
        shown="DejaVu Sans Bold",
    )
    object_name: str = option(
        "{id}", "picture", "a picture's name without its ending, around {id} or {generation_id} (the same)"
    )
    image_format: str | None = option(None, "picture", "png, jpeg or webp", shown="png")
    image_quality: int | None = option(
        None,
        "picture",
        "1 … 100, of a JPEG; a WebP is lossless unless it is given; a PNG always is",
        shown="95",
    )

    evaluator: str = option(
        "none",
        "evaluation",
        "scores each picture: none, clip or clip:MODEL (folder or hub id), gemini or gemini:MODEL, demo",
    )
    iterations: Annotated[int, Ge(1), Le(MOST_ITERATIONS)] = option(
        1,
        "evaluation",
        "rounds that a prompt gets, refined from the second on, until a picture scores enough",
    )
    candidates: Annotated[int, Ge(1), Le(MOST_CANDIDATES)] = option(
        1, "evaluation", "pictures in each round, with a seed each; the best of all is the result"
    )
    min_score: Annotated[float, Ge(0), Le(1)] | None = option(
        None, "evaluation", "the score, from 0 to 1, that is enough", shown="1"
    )
    gemini_api_key: str | None = option(None, "evaluation", "the key of --evaluator gemini", secret=True)
