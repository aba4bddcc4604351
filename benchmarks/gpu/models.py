"""Stable Diffusion 1.5 and XL at their full size, built from their configurations with random weights.

Speed does not depend on the weights, and so nothing is downloaded. The configurations are those of the
public checkpoints (Rombach et al. 2022; Podell et al. 2023); tests/benchmarks/test_gpu_models.py counts
their parameters and operations. Both get an Euler scheduler, which calls the UNet once a step.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_VOCABULARY = 49_408
_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model's configuration. ``side`` is its own size in pixels.

    ``unet_gflop``: floating-point operations (10⁹) of one forward pass for one latent picture, so that a
    step with classifier-free guidance takes two; ``vae_gflop``: of decoding one picture.
    """

    name: str
    side: int
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    texts: tuple[Mapping[str, Any], ...]
    unet_gflop: float
    vae_gflop: float

    def gflop(self, steps: int, guidance: float) -> float:
        """Operations (10⁹) of a whole picture, text encoders aside (under 0.1 %)."""
        return steps * (2 if guidance > 1 else 1) * self.unet_gflop + self.vae_gflop


SD15 = Model(
    name="SD 1.5",
    side=512,
    unet={
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    vae={**_VAE, "sample_size": 512, "scaling_factor": 0.18215},
    texts=(_CLIP_L,),
    unet_gflop=803.3,
    vae_gflop=2515,
)
SDXL = Model(
    name="SDXL",
    side=1024,
    unet={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae={**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
    texts=(_CLIP_L, _CLIP_G),
    unet_gflop=6761,
    vae_gflop=10_470,
)
MODELS = {"sd15": SD15, "sdxl": SDXL}


def tiny(model: Model) -> Model:
    """The same model with next to nothing in it, for a rehearsal; its counts of operations mean nothing."""
    blocks = len(model.unet["block_out_channels"])
    unet = {
        **model.unet,
        "sample_size": 8,
        "block_out_channels": (32,) * blocks,
        "layers_per_block": 1,
        "cross_attention_dim": 32 * len(model.texts),
        "attention_head_dim": 4,
    }
    if len(model.texts) > 1:
        more = {"transformer_layers_per_block": 1, "addition_time_embed_dim": 8}
        unet |= {**more, "projection_class_embeddings_input_dim": 6 * 8 + 32}
    text = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    return replace(
        model,
        name=f"tiny {model.name}",
        side=64,
        unet=unet,
        vae={**model.vae, "sample_size": 64, "block_out_channels": (32,) * 4, "layers_per_block": 1},
        texts=tuple({**each, **text, "projection_dim": 32} for each in model.texts),
        unet_gflop=1,
        vae_gflop=1,
    )


def unet(model: Model) -> Any:
    """Its UNet, on the default device in the default dtype."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**model.unet)


def vae(model: Model) -> Any:
    """Its autoencoder."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**model.vae)


def text_encoders(model: Model) -> list[Any]:
    """Its text encoders; a second one projects."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    last = _VOCABULARY - 1
    configs = [
        CLIPTextConfig(
            vocab_size=_VOCABULARY, bos_token_id=last - 1, eos_token_id=last, pad_token_id=last, **text
        )
        for text in model.texts
    ]
    return [
        kind(config)
        for kind, config in zip((CLIPTextModel, CLIPTextModelWithProjection), configs, strict=False)
    ]


def tokenizer(pad: str) -> Any:
    """CLIP's, by its size: a token a letter, the rest of 49,408 filled with tokens that no text has."""
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase + string.digits + ",.!"
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    pieces += [f"filler{number}</w>" for number in range(_VOCABULARY - len(pieces) - 2)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77, pad_token=pad)


def save(model: Model, folder: Path, device: str, dtype: str) -> None:
    """Write the model into ``folder`` as diffusers lays it out, its weights drawn on ``device``."""
    import torch

    torch.manual_seed(0)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            pipe = _pipeline(model)
        pipe.save_pretrained(folder)
    finally:
        torch.set_default_dtype(kept)


def _pipeline(model: Model) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    first, *more = text_encoders(model)
    parts: dict[str, Any] = {
        "unet": unet(model),
        "vae": vae(model),
        "text_encoder": first,
        "tokenizer": tokenizer("<|endoftext|>"),
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    }
    if more:
        return StableDiffusionXLPipeline(**parts, text_encoder_2=more[0], tokenizer_2=tokenizer("!"))
    return StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def save_tiny_autoencoder(folder: Path, dtype: str) -> None:
    """Write an AutoencoderTiny of its own default size (Bohan's TAESD) into ``folder``."""
    import torch
    from diffusers import AutoencoderTiny

    AutoencoderTiny().to(getattr(torch, dtype)).save_pretrained(folder)
