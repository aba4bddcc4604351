"""Tiny untrained models of newer pipelines, built in code as in ``models``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from tests.engine import models

if TYPE_CHECKING:
    from collections.abc import Callable

HIDDEN = models.HIDDEN
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(**more) -> transformers.Qwen2Tokenizer:
    """One token a byte, with the marks of chats."""
    vocab = {piece: number for number, piece in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[], **more)
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<think>", "</think>"]
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>", "additional_special_tokens": marks[1:]})
    tokenizer.chat_template = _CHAT
    return tokenizer


def _text_config(tokenizer, layers: int = 3) -> dict[str, object]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 37,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "bos_token_id": len(tokenizer) - 1,
        "eos_token_id": len(tokenizer) - 1,
        "pad_token_id": len(tokenizer) - 1,
    }


def _flow(**more) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def _qwen_vl(tokenizer) -> transformers.Qwen2_5_VLForConditionalGeneration:
    text = _text_config(tokenizer) | {
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def _qwen_vae() -> diffusers.AutoencoderKLQwenImage:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def qwen_image() -> diffusers.QwenImagePipeline:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    return diffusers.QwenImagePipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=_qwen_vae(),
        text_encoder=_qwen_vl(tokenizer),
        tokenizer=tokenizer,
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=HIDDEN, axes_dims_rope=(4, 4, 8),
        ),
    )  # fmt: skip


def z_image() -> diffusers.ZImagePipeline:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    return diffusers.ZImagePipeline(
        scheduler=_flow(shift=3.0),
        vae=models._vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**_text_config(tokenizer))),
        tokenizer=tokenizer,
        transformer=_initialised(
            diffusers.ZImageTransformer2DModel(
                in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
                cap_feat_dim=HIDDEN, axes_dims=[4, 4, 8], axes_lens=[1024, 64, 64],
            )
        ),
    )  # fmt: skip


def _initialised(module):
    """Fill weights that are created empty, and padding tokens, with small random numbers."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "pad_token" in name or not torch.isfinite(weight).all():
                weight.normal_(std=0.02)
    return module


def sana() -> diffusers.SanaPipeline:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    return diffusers.SanaPipeline(
        scheduler=_flow(shift=3.0),
        vae=_deep_vae(),
        text_encoder=_gemma(tokenizer),
        tokenizer=tokenizer,
        transformer=_sana_transformer(),
    )


def sana_sprint() -> diffusers.SanaSprintPipeline:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    return diffusers.SanaSprintPipeline(
        scheduler=diffusers.SCMScheduler(),
        vae=_deep_vae(),
        text_encoder=_gemma(tokenizer),
        tokenizer=tokenizer,
        transformer=_sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
    )


def _sana_transformer(**more) -> diffusers.SanaTransformer2DModel:
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=HIDDEN, sample_size=32, **more,
    )  # fmt: skip


def _gemma(tokenizer) -> transformers.Gemma2Model:
    return transformers.Gemma2Model(transformers.Gemma2Config(**_text_config(tokenizer)))


def _deep_vae() -> diffusers.AutoencoderDC:
    """One that makes 32 × 32 pixels of a latent one."""
    blocks = ("ResBlock",) * 6
    return diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, scaling_factor=0.4,
        encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(8,) * 6, decoder_block_out_channels=(8,) * 6,
        encoder_layers_per_block=(1,) * 6, decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6, decoder_qkv_multiscales=((),) * 6,
    )  # fmt: skip


def flux2_klein(*, distilled: bool = False) -> diffusers.Flux2KleinPipeline:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    return diffusers.Flux2KleinPipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=diffusers.AutoencoderKLFlux2(
            block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, sample_size=64
        ),
        text_encoder=transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(**_text_config(tokenizer, layers=28))
        ),
        tokenizer=tokenizer,
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=3 * HIDDEN, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        is_distilled=distilled,
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], object]] = {
    "qwen": qwen_image,
    "z-image": z_image,
    "sana": sana,
    "sana sprint": sana_sprint,
    "klein": flux2_klein,
    "klein distilled": lambda: flux2_klein(distilled=True),
}
