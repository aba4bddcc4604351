"""A pipeline's weights under its makers' key names: the reverse of what diffusers reads from one file."""

from __future__ import annotations

import re

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "downsamplers.0.conv": "downsample.conv",
    "upsamplers.0.conv": "upsample.conv",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "resnets.": "block.",
    "group_norm": "norm",
    "to_out.0": "proj_out",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
}
OPEN_CLIP = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "fc1": "c_fc",
    "fc2": "c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "final_layer_norm": "ln_final",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
}
SD3_EMBEDDINGS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
}
SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def replaced(key, names):
    for new, old in names.items():
        key = key.replace(new, old)
    return key


def unet(model, prefix="model.diffusion_model."):
    """A UNet's weights in the names of Stable Diffusion 1, 2 and XL."""
    depth = model.config.layers_per_block + 1
    weights = model.state_dict()

    def name(key):
        found = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
        if found is None:
            start = next(new for new in UNET if key.startswith(new))
            return UNET[start] + replaced(key[len(start) :], RESNET if "resnets" in start else {})
        side, block, part, layer, rest = found[1], int(found[2]), found[3], int(found[4]), found[5]
        at = block * depth + layer + (side == "down")
        blocks = "input_blocks" if side == "down" else "output_blocks"
        if part == "resnets":
            return f"{blocks}.{at}.0.{replaced(rest, RESNET)}"
        if part == "attentions":
            return f"{blocks}.{at}.1.{rest}"
        if part == "downsamplers":
            return f"{blocks}.{(block + 1) * depth}.0.{rest.replace('conv', 'op')}"
        attends = any(each.startswith(f"up_blocks.{block}.attentions") for each in weights)
        return f"{blocks}.{(block + 1) * depth - 1}.{1 + attends}.{rest}"

    return {prefix + name(key): weight for key, weight in weights.items()}


def vae(model, prefix="first_stage_model."):
    """An autoencoder's weights; its attention was a convolution."""
    levels = len(model.config.up_block_types)

    def name(key):
        key = re.sub(r"decoder\.up_blocks\.(\d+)", lambda at: f"decoder.up.{levels - 1 - int(at[1])}", key)
        return prefix + replaced(key.replace("encoder.down_blocks", "encoder.down"), VAE)

    attention = re.compile(r"attentions\.0\.to_\w+(\.0)?\.weight")
    return {
        name(key): weight[:, :, None, None] if attention.search(key) else weight
        for key, weight in model.state_dict().items()
    }


def clip(model, prefix):
    """A text encoder's weights in transformers' names, as they were before release 5."""
    plain = {key.removeprefix("text_model."): weight for key, weight in model.state_dict().items()}
    return {
        prefix + (key if key.startswith("text_projection") else f"text_model.{key}"): weight
        for key, weight in plain.items()
    }


def open_clip(model, prefix):
    """A text encoder's weights in OpenCLIP's names: one matrix for query, key and value."""
    weights = {key.removeprefix("text_model."): weight for key, weight in model.state_dict().items()}
    made = {}
    for key, weight in weights.items():
        if key == "text_projection.weight":
            made[f"{prefix}text_projection"] = weight.T
        elif "q_proj" in key:
            joined = torch.cat([weights[key.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            whole = key.replace("self_attn.q_proj.", "attn.in_proj_")
            made[prefix + replaced(whole, OPEN_CLIP)] = joined
        elif not re.search("[kv]_proj", key):
            made[prefix + replaced(key, OPEN_CLIP)] = weight
    return made


def t5(model, prefix):
    """T5's weights: the embedding is there once."""
    return {
        prefix + key: weight
        for key, weight in model.state_dict().items()
        if key != "encoder.embed_tokens.weight"
    }


def sd3_transformer(model, prefix="model.diffusion_model."):
    """The weights of Stable Diffusion 3's transformer: scale and shift stand in the other order."""
    weights, made, last = model.state_dict(), {}, model.config.num_layers - 1

    def swapped(weight):
        first, second = weight.chunk(2, dim=0)
        return torch.cat([second, first])

    for key, weight in weights.items():
        block = re.match(r"transformer_blocks\.(\d+)\.(.*)\.(weight|bias)", key)
        if key.startswith("norm_out.linear"):
            made[replaced(key, {"norm_out.linear": "final_layer.adaLN_modulation.1"})] = swapped(weight)
        elif block is None:
            made[replaced(key, SD3_EMBEDDINGS)] = weight
        elif block[2] in {"attn.to_q", "attn.add_q_proj"}:
            side = "x_block" if "to_q" in key else "context_block"
            joined = torch.cat([weights[re.sub("_q", f"_{part}", key)] for part in "qkv"])
            made[f"joint_blocks.{block[1]}.{side}.attn.qkv.{block[3]}"] = joined
        elif block[2] in SD3_BLOCK:
            final = block[2] == "norm1_context.linear" and int(block[1]) == last
            name = f"joint_blocks.{block[1]}.{SD3_BLOCK[block[2]]}.{block[3]}"
            made[name] = swapped(weight) if final else weight
    return {prefix + key: weight for key, weight in made.items()}


def sd1(pipe):
    return {
        **unet(pipe.unet),
        **vae(pipe.vae),
        **clip(pipe.text_encoder, "cond_stage_model.transformer."),
    }


def sd2(pipe):
    return {**unet(pipe.unet), **vae(pipe.vae), **open_clip(pipe.text_encoder, "cond_stage_model.model.")}


def sdxl(pipe):
    return {
        **unet(pipe.unet),
        **vae(pipe.vae),
        **clip(pipe.text_encoder, "conditioner.embedders.0.transformer."),
        **open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model."),
    }


def sd3(pipe):
    return {
        **sd3_transformer(pipe.transformer),
        **vae(pipe.vae),
        **clip(pipe.text_encoder, "text_encoders.clip_l.transformer."),
        **clip(pipe.text_encoder_2, "text_encoders.clip_g.transformer."),
        **t5(pipe.text_encoder_3, "text_encoders.t5xxl.transformer."),
    }


def write(file, weights, **metadata):
    """Write the weights into a file; returns it."""
    whole = {key: weight.detach().clone().contiguous() for key, weight in weights.items()}
    save_file(whole, file, {"format": "pt", **metadata})
    return file
