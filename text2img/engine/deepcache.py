"""DeepCache, a feature cache for UNets: the deep layers run only at every n-th call and are reused between.

DeepCache (Ma, Fang, Wang 2023, arXiv 2312.00858) relies on the output of the deep layers hardly changing from
one denoising step to the next. In between, only the outermost down layer runs, and the two up layers that
take its output and its input. On Stable Diffusion 1.5 at 512² that is 22 % of a call's floating-point
operations, on XL at 1024² 4 %. The images change a little: it is an approximation.

Supports the UNets of Stable Diffusion 1, 2 and XL as diffusers builds them.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from text2img.engine.model_folder import ModelFolder

    Conditioning = Mapping[str, Any]

_FAMILIES: Final = ("sd", "sdxl")
_DOWN_BLOCK_TYPES: Final = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP_BLOCK_TYPES: Final = ("UpBlock2D", "CrossAttnUpBlock2D")
_OUTER_UP_LAYERS: Final = 2
"""Up layers that always run: one for each of the two skip connections from the outermost down layer."""
_OPTIONAL_CONDITIONING: Final = ("timestep_cond", "added_cond_kwargs")
"""Inputs of a UNet that may come in addition to the sample, the time and the text."""
_UNSUPPORTED_CONFIG: Final = ("class_embed_type", "num_class_embeds", "center_input_sample")
"""Options of a UNet's configuration that no text-to-image model of these families has used."""


def check_unet(model: ModelFolder) -> None:
    """Raise ConfigurationError if the model's noise predictor does not support a feature cache."""
    if model.family.name not in _FAMILIES:
        raise ConfigurationError(
            f"a feature cache works with the UNets of Stable Diffusion 1, 2 and XL, and this model is a"
            f" {model.pipeline}: leave out --feature-cache (feature_cache in the model configuration)"
        )
    config = model.components["unet"].config
    down = config.get("down_block_types") or _DOWN_BLOCK_TYPES[:1]
    up = config.get("up_block_types") or _UP_BLOCK_TYPES[:1]
    unsupported = any(config.get(name) for name in _UNSUPPORTED_CONFIG)
    if down[0] not in _DOWN_BLOCK_TYPES or up[-1] not in _UP_BLOCK_TYPES or unsupported:
        raise ConfigurationError(
            "a feature cache does not support the block types of this model's UNet: leave out --feature-cache"
            " (feature_cache in the model configuration)"
        )


class DeepCache:
    """Replaces a UNet's ``forward``: every ``interval``-th call is full, the others run the outer layers.

    It counts calls, not steps: with a scheduler that calls the UNet twice a step (Heun's), every n-th call is
    full. With ``interval`` 1 each call is full and returns, bit by bit, what the UNet's own forward returns.
    """

    def __init__(self, unet: Any, interval: int) -> None:
        self._unet = unet
        self._interval = interval
        self._full_forward, self._cached_forward = full_forward, cached_forward
        self._calls = 0
        self._features: Any = None

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """Delimit one denoising run: the features are discarded when it ends, also after an error."""
        try:
            yield
        finally:
            self._calls, self._features = 0, None

    def compile(self, **options: Any) -> None:
        """Replace ``torch.nn.Module.compile``: both kinds of call are compiled, each at its first call."""
        import torch

        self._full_forward = torch.compile(full_forward, **options)
        self._cached_forward = torch.compile(cached_forward, **options)

    def __call__(
        self,
        sample: Any,
        timestep: Any,
        encoder_hidden_states: Any,
        *,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Return what ``UNet2DConditionModel.forward`` returns, for the arguments that pipelines pass.

        ``sample``: (n, c, h, w); ``timestep``: one for all; ``encoder_hidden_states``: (n, tokens, d).
        """
        conditioning = {
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
            **_optional_conditioning(kwargs),
        }
        if self._calls % self._interval == 0:
            predicted, self._features = self._full_forward(self._unet, sample, conditioning)
        else:
            predicted = self._cached_forward(self._unet, sample, conditioning, self._features)
        self._calls += 1
        if not return_dict:
            return (predicted,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=predicted)


def _optional_conditioning(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the supported arguments; raise TypeError if others (masks, ControlNet's residuals) are set."""
    unsupported = [name for name in kwargs if name not in _OPTIONAL_CONDITIONING and kwargs[name] is not None]
    if unsupported:
        raise TypeError(f"a feature cache does not support {', '.join(unsupported)}")
    return {name: value for name, value in kwargs.items() if name in _OPTIONAL_CONDITIONING}


def install(unet: Any, interval: int) -> DeepCache:
    """Replace ``forward`` and ``compile`` of ``unet`` (a UNet2DConditionModel) by a feature cache."""
    cache = DeepCache(unet, interval)
    unet.forward, unet.compile = cache, cache.compile
    return cache


def full_forward(unet: Any, sample: Any, conditioning: Conditioning) -> tuple[Any, Any]:
    """Return the prediction, (n, c, h, w), and the features that enter the outermost up layers.

    The steps are those of ``UNet2DConditionModel.forward`` (diffusers 0.42), in its order.
    """
    res_samples, emb, text = _conv_in(unet, sample, conditioning)
    features = _inner_blocks(unet, res_samples, emb, text)
    return _conv_out(unet, features, res_samples, emb, text), features


def cached_forward(unet: Any, sample: Any, conditioning: Conditioning, features: Any) -> Any:
    """Return the prediction, (n, c, h, w), of the outermost layers with ``features`` of an earlier call."""
    res_samples, emb, text = _conv_in(unet, sample, conditioning)
    return _conv_out(unet, features, res_samples, emb, text)


def _conv_in(unet: Any, sample: Any, conditioning: Conditioning) -> tuple[list[Any], Any, Any]:
    """Run ``conv_in`` and the first down layer.

    Returns that layer's input and output (the outermost residuals), the time's embedding, and the text as the
    attention layers take it.
    """
    text, added = conditioning["encoder_hidden_states"], conditioning.get("added_cond_kwargs")
    time = unet.get_time_embed(sample=sample, timestep=conditioning["timestep"])
    emb = unet.time_embedding(time, conditioning.get("timestep_cond"))
    aug_emb = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
    emb = emb if aug_emb is None else emb + aug_emb
    emb = emb if unet.time_embed_act is None else unet.time_embed_act(emb)
    text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)
    sample = unet.conv_in(sample)
    first_layer = next(_layers(unet.down_blocks[0]))
    return [sample, _run_layer(first_layer, sample, emb, text)], emb, text


def _inner_blocks(unet: Any, res_samples: Iterable[Any], emb: Any, text: Any) -> Any:
    """Run everything between the first down layer and the outermost up layers; return the features."""
    res_samples = list(res_samples)
    _down_blocks(unet, res_samples, emb, text)
    sample = res_samples[-1]
    if unet.mid_block is not None:
        sample = unet.mid_block(sample, emb, **_cross_attention_arguments(unet.mid_block, text))
    sample = _up_blocks(unet, sample, res_samples, emb, text)
    for layer in list(_layers(unet.up_blocks[-1]))[:-_OUTER_UP_LAYERS]:
        sample = _run_up_layer(layer, sample, res_samples.pop(), emb, text)
    return sample


def _down_blocks(unet: Any, res_samples: list[Any], emb: Any, text: Any) -> None:
    """Run the down blocks after the first layer, and append their outputs to ``res_samples``."""
    outermost, *others = unet.down_blocks
    for layer in list(_layers(outermost))[1:]:
        res_samples.append(_run_layer(layer, res_samples[-1], emb, text))
    for downsampler in outermost.downsamplers or ():
        res_samples.append(downsampler(res_samples[-1]))
    for block in others:
        arguments = _cross_attention_arguments(block, text)
        res_samples += block(hidden_states=res_samples[-1], temb=emb, **arguments)[1]


def _up_blocks(unet: Any, sample: Any, res_samples: list[Any], emb: Any, text: Any) -> Any:
    """Run all up blocks except the outermost; removes the residuals that they take from ``res_samples``."""
    odd = any(side % 2**unet.num_upsamplers for side in res_samples[0].shape[-2:])
    for block in list(unet.up_blocks)[:-1]:
        count = len(block.resnets)
        taken, res_samples[-count:] = tuple(res_samples[-count:]), []
        sample = block(
            hidden_states=sample,
            temb=emb,
            res_hidden_states_tuple=taken,
            upsample_size=res_samples[-1].shape[2:] if odd else None,
            **_cross_attention_arguments(block, text),
        )
    return sample


def _conv_out(unet: Any, features: Any, res_samples: Iterable[Any], emb: Any, text: Any) -> Any:
    """Run the outermost up layers and ``conv_out``."""
    sample, res_samples = features, list(res_samples)
    for layer in list(_layers(unet.up_blocks[-1]))[-_OUTER_UP_LAYERS:]:
        sample = _run_up_layer(layer, sample, res_samples.pop(), emb, text)
    if unet.conv_norm_out is not None:
        sample = unet.conv_act(unet.conv_norm_out(sample))
    return unet.conv_out(sample)


def _layers(block: Any) -> Iterator[tuple[Any, Any]]:
    """Return a block's layers: each a residual network, and the attention after it or None."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return zip(block.resnets, attentions, strict=True)


def _run_layer(layer: tuple[Any, Any], sample: Any, emb: Any, text: Any) -> Any:
    resnet, attention = layer
    sample = resnet(sample, emb)
    if attention is None:
        return sample
    return attention(sample, encoder_hidden_states=text, return_dict=False)[0]


def _run_up_layer(layer: tuple[Any, Any], sample: Any, res_sample: Any, emb: Any, text: Any) -> Any:
    """Run an up layer on the sample concatenated with the residual of its skip connection."""
    import torch

    return _run_layer(layer, torch.cat([sample, res_sample], dim=1), emb, text)


def _cross_attention_arguments(block: Any, text: Any) -> dict[str, Any]:
    """Return the text as a keyword argument, for blocks that have cross-attention."""
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
