"""A feature cache for UNets: their deep part runs at every n-th call, its result serves the calls between.

DeepCache (Ma, Fang, Wang 2023, arXiv 2312.00858): what the deep layers make of a picture hardly changes from
one denoising step to the next. Between, only the outermost layer on the way down runs, and the two layers on
the way up that take its result and its input. On Stable Diffusion 1.5 at 512² that is 22 % of a call's
floating-point operations, on XL at 1024² 4 %. The pictures change a little: it is an approximation.

Knows the UNets of Stable Diffusion 1, 2 and XL as diffusers builds them; knows no pipeline and no scheduler.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from text2img.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from text2img.engine.model_folder import ModelFolder

    Told = Mapping[str, Any]

_FAMILIES: Final = ("sd", "sdxl")
_DOWN: Final = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP: Final = ("UpBlock2D", "CrossAttnUpBlock2D")
_OUTER_UP: Final = 2
"""Layers on the way up that always run: one for each of the two skip connections from the way down."""
_TOLD: Final = ("timestep_cond", "added_cond_kwargs")
"""What a UNet is told beside the sample, the time and the text."""
_UNREAD: Final = ("class_embed_type", "num_class_embeds", "center_input_sample")
"""What a UNet's configuration may hold that no text-to-image model of these families has used."""


def check_unet(model: ModelFolder) -> None:
    """Raise ConfigurationError where the model's noise predictor cannot be run in two parts."""
    if model.family.name not in _FAMILIES:
        raise ConfigurationError(
            f"a feature cache works with the UNets of Stable Diffusion 1, 2 and XL, and this model is a"
            f" {model.pipeline}: leave out --feature-cache (feature_cache in the model configuration)"
        )
    config = model.components["unet"].config
    down, up = config.get("down_block_types") or _DOWN[:1], config.get("up_block_types") or _UP[:1]
    if down[0] not in _DOWN or up[-1] not in _UP or any(config.get(name) for name in _UNREAD):
        raise ConfigurationError(
            "a feature cache does not work with this model's UNet, whose blocks are of another kind: leave"
            " out --feature-cache (feature_cache in the model configuration)"
        )


class DeepCache:
    """Takes the place of a UNet's ``forward``: every ``every``-th call is whole, the others outer only.

    It counts calls, not steps: a scheduler that asks twice a step (Heun's) gets a whole call at every n-th
    question. With ``every`` 1 each call is whole and gives, bit by bit, what the UNet's own forward gives.
    """

    def __init__(self, unet: Any, every: int) -> None:
        self._unet = unet
        self._every = every
        self._run_whole, self._run_outer = whole, outer
        self._calls = 0
        self._features: Any = None

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """One denoising run: afterwards, however it ended, nothing is remembered of it."""
        try:
            yield
        finally:
            self._calls, self._features = 0, None

    def compile(self, **how: Any) -> None:
        """What ``torch.nn.Module.compile`` is to a UNet: both kinds of call are compiled, at their first."""
        import torch

        self._run_whole, self._run_outer = torch.compile(whole, **how), torch.compile(outer, **how)

    def __call__(
        self, sample: Any, timestep: Any, encoder_hidden_states: Any, *, return_dict: bool = True, **more: Any
    ) -> Any:
        """What diffusers' ``UNet2DConditionModel.forward`` gives, for the arguments that pipelines pass it.

        ``sample``: (n, c, h, w); ``timestep``: one for all; ``encoder_hidden_states``: (n, tokens, d).
        """
        told = {"timestep": timestep, "encoder_hidden_states": encoder_hidden_states, **_heeded(more)}
        if self._calls % self._every == 0:
            predicted, self._features = self._run_whole(self._unet, sample, told)
        else:
            predicted = self._run_outer(self._unet, sample, told, self._features)
        self._calls += 1
        if not return_dict:
            return (predicted,)
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        return UNet2DConditionOutput(sample=predicted)


def _heeded(more: Mapping[str, Any]) -> dict[str, Any]:
    """The further arguments; those that would be passed over (masks, ControlNet's residuals) must be None."""
    passed_over = [name for name in more if name not in _TOLD and more[name] is not None]
    if passed_over:
        raise TypeError(f"a feature cache does not heed {', '.join(passed_over)}")
    return {name: value for name, value in more.items() if name in _TOLD}


def install(unet: Any, every: int) -> DeepCache:
    """Put a feature cache into ``unet`` (a UNet2DConditionModel), whoever calls or compiles it."""
    cache = DeepCache(unet, every)
    unet.forward, unet.compile = cache, cache.compile
    return cache


def whole(unet: Any, sample: Any, told: Told) -> tuple[Any, Any]:
    """The prediction, (n, c, h, w), and the features that come up from below to the outermost layers.

    The steps are those of ``UNet2DConditionModel.forward`` (diffusers 0.42), in its order.
    """
    skips, emb, text = _enter(unet, sample, told)
    features = _deep(unet, skips, emb, text)
    return _leave(unet, features, skips, emb, text), features


def outer(unet: Any, sample: Any, told: Told, features: Any) -> Any:
    """The prediction, (n, c, h, w), by the outermost layers alone, with ``features`` of an earlier call."""
    skips, emb, text = _enter(unet, sample, told)
    return _leave(unet, features, skips, emb, text)


def _enter(unet: Any, sample: Any, told: Told) -> tuple[list[Any], Any, Any]:
    """The first layer's input and output, which skip what is deep; the time's embedding; the text as it is
    attended to.
    """
    text, added = told["encoder_hidden_states"], told.get("added_cond_kwargs")
    time = unet.get_time_embed(sample=sample, timestep=told["timestep"])
    emb = unet.time_embedding(time, told.get("timestep_cond"))
    more = unet.get_aug_embed(emb=emb, encoder_hidden_states=text, added_cond_kwargs=added)
    emb = emb if more is None else emb + more
    emb = emb if unet.time_embed_act is None else unet.time_embed_act(emb)
    text = unet.process_encoder_hidden_states(encoder_hidden_states=text, added_cond_kwargs=added)
    entered = unet.conv_in(sample)
    first = next(_layers(unet.down_blocks[0]))
    return [entered, _through(first, entered, emb, text)], emb, text


def _deep(unet: Any, skips: Iterable[Any], emb: Any, text: Any) -> Any:
    """From the first layer's output all the way down and up again, as far as the outermost layers."""
    skips = list(skips)
    _down(unet, skips, emb, text)
    sample = skips[-1]
    if unet.mid_block is not None:
        sample = unet.mid_block(sample, emb, **_attended(unet.mid_block, text))
    sample = _up(unet, sample, skips, emb, text)
    for layer in list(_layers(unet.up_blocks[-1]))[:-_OUTER_UP]:
        sample = _joined(layer, sample, skips.pop(), emb, text)
    return sample


def _down(unet: Any, skips: list[Any], emb: Any, text: Any) -> None:
    """Run what comes after the first layer on the way down, and append to ``skips`` what each step leaves."""
    outermost, *others = unet.down_blocks
    for layer in list(_layers(outermost))[1:]:
        skips.append(_through(layer, skips[-1], emb, text))
    for downsampler in outermost.downsamplers or ():
        skips.append(downsampler(skips[-1]))
    for block in others:
        skips += block(hidden_states=skips[-1], temb=emb, **_attended(block, text))[1]


def _up(unet: Any, sample: Any, skips: list[Any], emb: Any, text: Any) -> Any:
    """All blocks on the way up but the outermost; what they take is gone from ``skips``."""
    odd = any(side % 2**unet.num_upsamplers for side in skips[0].shape[-2:])
    for block in list(unet.up_blocks)[:-1]:
        taken = len(block.resnets)
        joined, skips[-taken:] = tuple(skips[-taken:]), []
        sample = block(
            hidden_states=sample,
            temb=emb,
            res_hidden_states_tuple=joined,
            upsample_size=skips[-1].shape[2:] if odd else None,
            **_attended(block, text),
        )
    return sample


def _leave(unet: Any, features: Any, skips: Iterable[Any], emb: Any, text: Any) -> Any:
    """The outermost layers on the way up, and the last convolution."""
    sample, skips = features, list(skips)
    for layer in list(_layers(unet.up_blocks[-1]))[-_OUTER_UP:]:
        sample = _joined(layer, sample, skips.pop(), emb, text)
    if unet.conv_norm_out is not None:
        sample = unet.conv_act(unet.conv_norm_out(sample))
    return unet.conv_out(sample)


def _layers(block: Any) -> Iterator[tuple[Any, Any]]:
    """A block's layers: a residual network each, and the attention behind it where there is one."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return zip(block.resnets, attentions, strict=True)


def _through(layer: tuple[Any, Any], sample: Any, emb: Any, text: Any) -> Any:
    resnet, attention = layer
    sample = resnet(sample, emb)
    if attention is None:
        return sample
    return attention(sample, encoder_hidden_states=text, return_dict=False)[0]


def _joined(layer: tuple[Any, Any], sample: Any, skip: Any, emb: Any, text: Any) -> Any:
    """Through a layer on the way up, with what skipped the layers below beside the sample."""
    import torch

    return _through(layer, torch.cat([sample, skip], dim=1), emb, text)


def _attended(block: Any, text: Any) -> dict[str, Any]:
    """The text, for blocks that attend to it."""
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
