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


def flux2_klein_kv() -> diffusers.Flux2KleinKVPipeline:
    parts = flux2_klein().components
    return diffusers.Flux2KleinKVPipeline(**parts)


def _t5_parts() -> tuple[object, object]:
    tokenizer = models.t5_tokenizer()
    return tokenizer, models._t5(len(tokenizer))


def chroma() -> diffusers.ChromaPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = _t5_parts()
    return diffusers.ChromaPipeline(
        scheduler=_flow(shift=3.0),
        vae=models._vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=HIDDEN, axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
            approximator_hidden_dim=32, approximator_layers=1,
        ),
    )  # fmt: skip


def aura_flow() -> diffusers.AuraFlowPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = _t5_parts()
    return diffusers.AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=models._vae(),
        scheduler=_flow(),
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
            num_attention_heads=4, joint_attention_dim=HIDDEN, caption_projection_dim=32,
            pos_embed_max_size=256,
        ),
    )  # fmt: skip


def pixart_sigma() -> diffusers.PixArtSigmaPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = _t5_parts()
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=models._vae(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        transformer=_pixart_transformer(),
    )


def _pixart_transformer() -> diffusers.PixArtTransformer2DModel:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, cross_attention_dim=16, sample_size=32,
        caption_channels=HIDDEN, use_additional_conditions=False,
    )  # fmt: skip


def lumina2() -> diffusers.Lumina2Pipeline:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    return diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
            num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 128, 128), cap_feat_dim=HIDDEN,
        ),
        scheduler=_flow(shift=3.0),
        vae=models._vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=_gemma(tokenizer),
        tokenizer=tokenizer,
    )  # fmt: skip


def ovis() -> diffusers.OvisImagePipeline:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    return diffusers.OvisImagePipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=models._vae(shift_factor=0.06, scaling_factor=1.5),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**_text_config(tokenizer))),
        tokenizer=tokenizer,
        transformer=diffusers.OvisImageTransformer2DModel(
            in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=HIDDEN, axes_dims_rope=(4, 4, 8),
        ),
    )  # fmt: skip


def _pag(kind: str) -> object:
    """A model of the first families with perturbed attention guidance."""
    base, pipeline = {
        "sd1": (models.sd1, diffusers.StableDiffusionPAGPipeline),
        "sdxl": (models.sdxl, diffusers.StableDiffusionXLPAGPipeline),
        "sd3": (models.sd3, diffusers.StableDiffusion3PAGPipeline),
    }[kind]
    parts = base().components
    unused = ("safety_checker", "feature_extractor", "image_encoder")
    kept = {name: part for name, part in parts.items() if name not in unused}
    if kind == "sd3":  # by default the second block is perturbed
        config = {**kept["transformer"].config, "num_layers": 2}
        kept["transformer"] = diffusers.SD3Transformer2DModel.from_config(config)
    more = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return pipeline(**kept, **(more if kind == "sd1" else {}))


def deepfloyd_if() -> diffusers.IFPipeline:
    torch.manual_seed(0)
    tokenizer, text_encoder = _t5_parts()
    return diffusers.IFPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder,
        unet=diffusers.UNet2DConditionModel(
            sample_size=64, in_channels=3, out_channels=6, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"), norm_num_groups=4,
            cross_attention_dim=HIDDEN, attention_head_dim=8, encoder_hid_dim=HIDDEN,
            addition_embed_type="text", addition_embed_type_num_heads=2,
            resnet_time_scale_shift="scale_shift",
        ),
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range", thresholding=True),
        safety_checker=None, feature_extractor=None, watermarker=None, requires_safety_checker=False,
    )  # fmt: skip


def amused() -> diffusers.AmusedPipeline:
    torch.manual_seed(0)
    tokenizer = models.clip_tokenizer()
    config = models._clip_config(len(tokenizer), projection_dim=HIDDEN)
    return diffusers.AmusedPipeline(
        vqvae=diffusers.VQModel(
            block_out_channels=(8,) * 5, down_block_types=["DownEncoderBlock2D"] * 5,
            up_block_types=["UpDecoderBlock2D"] * 5, latent_channels=8, num_vq_embeddings=32,
            norm_num_groups=4, mid_block_add_attention=False, lookup_from_codebook=True,
        ),
        tokenizer=tokenizer,
        text_encoder=transformers.CLIPTextModelWithProjection(config),
        transformer=diffusers.UVit2DModel(
            hidden_size=8, cond_embed_dim=HIDDEN, micro_cond_encode_dim=2, micro_cond_embed_dim=10,
            encoder_hidden_size=HIDDEN, vocab_size=32, codebook_size=32, in_channels=8, block_out_channels=8,
            num_res_blocks=1, block_num_heads=1, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=8, sample_size=16,
        ),
        scheduler=diffusers.AmusedScheduler(mask_token_id=31),
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], object]] = {
    "qwen": qwen_image,
    "z-image": z_image,
    "sana": sana,
    "sana sprint": sana_sprint,
    "klein": flux2_klein,
    "klein distilled": lambda: flux2_klein(distilled=True),
    "klein kv": flux2_klein_kv,
    "chroma": chroma,
    "aura flow": aura_flow,
    "pixart": pixart_sigma,
    "lumina 2": lumina2,
    "ovis": ovis,
    "sd1 pag": lambda: _pag("sd1"),
    "sdxl pag": lambda: _pag("sdxl"),
    "sd3 pag": lambda: _pag("sd3"),
    "if": deepfloyd_if,
    "amused": amused,
}
