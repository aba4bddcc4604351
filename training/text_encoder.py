"""The text encoder, taught on words alone before it ever guides a picture, as the real CLIP is.

It learns to carry a caption's four attributes in every token from the end mark on. The UNet then finds the
whole caption wherever it looks among the padding, and learns the words in minutes instead of an hour.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel

from text2img.demo.scenes import COLOURS, SHAPES, SIZES, Scene, all_scenes
from training.schedule import Course, Learner

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import CLIPTokenizer

WIDTH = 64
CLASSES = {"size": list(SIZES), "colour": list(COLOURS), "shape": list(SHAPES), "background": list(COLOURS)}


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder of 0.11 million parameters for this tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_text_encoder(tokenizer: CLIPTokenizer, steps: int, checkpoint: Path) -> CLIPTextModel:
    """A text encoder whose tokens, from the end mark on, tell each attribute of the caption."""
    torch.manual_seed(2)
    encoder = build_text_encoder(tokenizer)
    heads = nn.ModuleDict({name: nn.Linear(WIDTH, len(classes)) for name, classes in CLASSES.items()})
    learner = Learner(nn.ModuleList([encoder, heads]), Course(steps), checkpoint)
    scenes = list(all_scenes())
    tokens, labels = tokenize(tokenizer, [scene.caption for scene in scenes]), _labels(scenes)
    chance = torch.Generator().manual_seed(learner.step)

    def loss(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = encoder(tokens)[0]
        ended = tokens == tokenizer.eos_token_id  # the padding is the end mark again
        told = functional.dropout(hidden[ended], 0.1)  # spreads each attribute over many channels
        repeats = ended.sum(dim=1)
        losses = [
            functional.cross_entropy(head(told), labels[:, column].repeat_interleave(repeats))
            for column, head in enumerate(heads.values())
        ]
        return torch.stack(losses).sum()

    for _ in learner.steps():
        picks = torch.randint(len(scenes), (64,), generator=chance)
        learner.learn(loss, tokens[picks], labels[picks])
    return encoder.eval().requires_grad_(requires_grad=False)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """The tokens of each text, padded to the full length as the pipeline pads: (n, 77)."""
    tokens: torch.Tensor = tokenizer(
        texts,
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    ).input_ids
    return tokens


def embed(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """What the UNet is given for each text: (n, 77, 64)."""
    with torch.inference_mode():
        hidden: torch.Tensor = encoder(tokenize(tokenizer, texts))[0]
    return hidden


def _labels(scenes: list[Scene]) -> torch.Tensor:
    """Each scene's attributes as numbers of their classes: (n, 4)."""
    return torch.tensor(
        [[classes.index(getattr(scene, name)) for name, classes in CLASSES.items()] for scene in scenes]
    )
