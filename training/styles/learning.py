"""A LoRA (Hu et al. 2021, arXiv 2106.09685) that lets a model read one caption as if it were another.

A UNet reads words by the matrices of its cross-attention that make keys and values. They are changed so that
what they make of a caption is what they made of the other one: a least-squares problem with a solution of
low rank, found in a second where training by pictures takes an hour. What a matrix cannot do is left to an
adapter in the text encoder, trained for a minute. Knows no style and no pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, get_peft_model_state_dict
from torch.nn import functional

from training.text_encoder import embed, tokenize

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import StableDiffusionPipeline

RANK = 8  # four pairs of opposite colours, for the shape and for the background
UNET_LAYERS = r".*\.attn2\.to_[kv]"
ENCODER_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
BATCH = 64


def learn(pipeline: StableDiffusionPipeline, captions: list[str], meant: list[str], steps: int) -> float:
    """Put adapters into the pipeline with which it reads each caption as it would read the ``meant`` one.

    Gives the part of the difference that is left, of its sum of squares.
    """
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    told, aim = (embed(encoder, tokenizer, texts).clone() for texts in (captions, meant))
    down, up = reduce(told.flatten(0, 1), aim.flatten(0, 1), RANK)
    _put(pipeline.unet, down, up)
    ids = tokenize(tokenizer, captions)
    read = torch.eye(down.shape[1]) + down.T @ up.T  # by the UNet, of what the encoder says
    return _mend(encoder, ids, aim, read, steps) / functional.mse_loss(told, aim).item()


def reduce(told: torch.Tensor, meant: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices, (rank, d) and (d, rank), whose product takes each row of ``told`` (n, d) nearest to what
    ``meant`` adds to it.

    Reduced-rank regression (Izenman 1975): the best of full rank, where it does most.
    """
    told, added = told.double(), (meant - told).double()
    whole = torch.linalg.lstsq(told, added).solution
    most = torch.linalg.svd(told @ whole, full_matrices=False).Vh[:rank]
    down, up = most @ whole.T, most.T
    size = down.norm(
        dim=1, keepdim=True
    ).sqrt()  # shared out between the two: half precision has a small range
    return (down / size).float(), (up * size.T).float()


def _put(unet: torch.nn.Module, down: torch.Tensor, up: torch.Tensor) -> None:
    """Have every key and value read its words through the two matrices as well."""
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=UNET_LAYERS))
    with torch.no_grad():
        for layer in unet.modules():
            if hasattr(layer, "lora_A"):
                layer.lora_A["default"].weight.copy_(down)
                layer.lora_B["default"].weight.copy_(layer.base_layer.weight @ up)


def _mend(
    encoder: torch.nn.Module, ids: torch.Tensor, aim: torch.Tensor, read: torch.Tensor, steps: int
) -> float:
    """Train an adapter in the text encoder until, read so, it says what is aimed at; the error at the end."""
    torch.manual_seed(9)
    encoder.requires_grad_(requires_grad=False)
    encoder.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ENCODER_LAYERS))
    weights = [weight for weight in encoder.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    errors = []
    for step in range(steps):
        picks = torch.randint(len(ids), (BATCH,))
        error = functional.mse_loss(encoder(ids[picks])[0] @ read, aim[picks])
        optimiser.zero_grad()
        error.backward()
        optimiser.step()
        course.step()
        errors.append(error.item())
        if step % 100 == 0:
            print(f"{step:6}  error {errors[-1]:.5f}", flush=True)
    last = errors[-50:]
    return sum(last) / len(last)


def save_lora(pipeline: StableDiffusionPipeline, file: Path) -> None:
    """Write the pipeline's adapters in half precision, under peft's names, which need no translating."""
    parts = {"unet_lora_layers": pipeline.unet, "text_encoder_lora_layers": pipeline.text_encoder}
    layers = {
        name: {key: value.half() for key, value in _weights(part).items()} for name, part in parts.items()
    }
    pipeline.save_lora_weights(str(file.parent), weight_name=file.name, **layers)
    file.chmod(0o644)  # safetensors writes its files for the owner's eyes only


def _weights(part: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = get_peft_model_state_dict(part)
    return weights
