"""Tiny untrained models of each family, built in code: real configurations made small, random weights."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LETTERS = string.ascii_lowercase + string.digits + ",.!+-()"
HIDDEN = 32


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """One token a letter: a text fills as many tokens as it has letters."""
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, pad_token=pad)


def t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    vocab = [(piece, -float(number)) for number, piece in enumerate(pieces)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=77)


def _clip_config(size: int, **more) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=HIDDEN,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        **more,
    )


def _vae(**more) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[8, 8, 8, 8],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        **{"latent_channels": 4, **more},
    )


def tiny_autoencoder(**more) -> AutoencoderTiny:
    """One in the manner of TAESD, for latents of 4 channels at an eighth of the size."""
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
        **more,
    )


def _unet(**more) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **{"cross_attention_dim": HIDDEN, "attention_head_dim": 4, **more},
    )


def _t5(size: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=size, d_model=HIDDEN, d_kv=8, d_ff=37, num_layers=2, num_heads=4, is_decoder=False
        )
    )


def _pndm() -> PNDMScheduler:
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def sd1(*, checked: bool = False) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config(len(tokenizer))),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=_pndm(),
        safety_checker=_checker() if checked else None,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 30}, crop_size=30) if checked else None,
        requires_safety_checker=checked,
    )


def _checker() -> StableDiffusionSafetyChecker:
    """A checker that flags nothing, until its thresholds are lowered."""
    vision = {
        "hidden_size": HIDDEN,
        "intermediate_size": 37,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "image_size": 30,
        "patch_size": 15,
    }
    text = _clip_config(99).to_dict()
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    )
    checker.concept_embeds_weights.data.fill_(2.0)
    checker.special_care_embeds_weights.data.fill_(2.0)
    return checker


def sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    tokenizer, second = clip_tokenizer(), clip_tokenizer(pad="!")
    config = _clip_config(len(tokenizer), projection_dim=HIDDEN)
    return StableDiffusionXLPipeline(
        vae=_vae(force_upcast=True),
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=second,
        unet=_unet(
            cross_attention_dim=2 * HIDDEN,
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=6 * 8 + HIDDEN,
        ),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
    )


def sd3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    config = _clip_config(len(tokenizer), projection_dim=HIDDEN)
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=HIDDEN,
            caption_projection_dim=32,
            pooled_projection_dim=2 * HIDDEN,
            out_channels=4,
            pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(len(t5)),
        tokenizer_3=t5,
    )


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=CLIPTextModel(_clip_config(len(tokenizer))),
        tokenizer=tokenizer,
        text_encoder_2=_t5(len(t5)),
        tokenizer_2=t5,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=HIDDEN,
            pooled_projection_dim=HIDDEN,
            axes_dims_rope=[4, 4, 8],
            guidance_embeds=True,
        ),
    )


def lcm() -> LatentConsistencyModelPipeline:
    """A pipeline that the engine's table does not know."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    return LatentConsistencyModelPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_clip_config(len(tokenizer))),
        tokenizer=tokenizer,
        unet=_unet(time_cond_proj_dim=32),
        scheduler=LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


FAMILIES: dict[str, Callable[[], object]] = {
    "sd1": sd1,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "lcm": lcm,
    "tiny autoencoder": tiny_autoencoder,
}


def save(family: str, folder: Path, **how) -> Path:
    """Write the family's tiny model into ``folder``."""
    FAMILIES[family]().save_pretrained(folder, **how)
    return folder
