"""LoRAs for the tiny models and for the demo's, of random numbers, in the formats that trainers write."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

FORMATS = ("peft", "diffusers", "mixed", "kohya")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = ("q_proj", "v_proj", "fc1")


def attention(pipe, *, text=False):
    """The names of the modules that trainers usually adapt: ``component.path``, and what each is.

    A module that a LoRA is loaded for has its own name within that of peft's layer.
    """
    components = dict.fromkeys(("unet", "transformer"), _ATTENTION)
    if text:
        components |= {"text_encoder": _TEXT, "text_encoder_2": _TEXT}
    return {
        f"{component}.{path.removesuffix('.base_layer')}": module
        for component, ends in components.items()
        if getattr(pipe, component, None) is not None
        for path, module in getattr(pipe, component).named_modules()
        if path.removesuffix(".base_layer").endswith(ends) and isinstance(module, torch.nn.Linear)
    }


def halves(pipe, *, rank=4, seed=0, size=0.5, text=False):
    """Random lower and upper halves by module."""
    noise = torch.Generator().manual_seed(seed)

    def half(*shape):
        return torch.randn(*shape, generator=noise) * size

    return {
        name: (half(rank, module.in_features), half(module.out_features, rank))
        for name, module in attention(pipe, text=text).items()
    }


def tensors(made, style="peft", alpha=None):
    """The halves under the names of a format."""
    ends = {
        "peft": (".lora_A.weight", ".lora_B.weight"),
        "diffusers": (".lora.down.weight", ".lora.up.weight"),
        "mixed": (".lora_A.weight", ".lora_B.weight"),  # what convert_state_dict_to_diffusers writes
        "kohya": (".lora_down.weight", ".lora_up.weight"),
    }[style]
    named = {}
    for name, (down, up) in made.items():
        stem = _kohya(name) if style == "kohya" else name
        old = style == "diffusers" or (style == "mixed" and name.endswith("_proj"))
        if old and name.startswith("text_encoder"):
            ends_here = (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight")
        else:
            ends_here = ends
        named |= {stem + ends_here[0]: down, stem + ends_here[1]: up}
        if alpha is not None:
            named[f"{stem}.alpha"] = torch.tensor(float(alpha))
    return {key: value.contiguous() for key, value in named.items()}


def save(folder, named, name="style", **told):
    """A file of these tensors; what is ``told`` goes into diffusers' part of the metadata."""
    file = folder / f"{name}.safetensors"
    metadata = {"format": "pt", **({"lora_adapter_metadata": json.dumps(told)} if told else {})}
    save_file(named, file, metadata=metadata)
    return str(file)


def _kohya(name):
    component, _, path = name.partition(".")
    start = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}[component]
    whole = path if component == "unet" or path.startswith("text_model") else f"text_model.{path}"
    return f"{start}_{whole}".replace(".", "_")
