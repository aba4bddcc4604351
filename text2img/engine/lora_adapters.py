"""A pipeline's LoRA adapters: load, activate and unload them, and run them in a compiled denoiser.

The compiler treats each set of adapters as a model of its own. But what several LoRAs add to a layer is one
product of two matrices: the lower halves stacked, and the upper halves side by side, times their weights.
So a compiled denoiser has one buffer per adapted layer, all of one rank and padded with zeros. Changing the
LoRAs changes only the buffers' content, and the compiled code stays valid.

Imports torch, so import it only where there is a pipeline.
"""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from text2img.engine.devices import FailureKind, classify_error, one_line
from text2img.engine.lora_weights import read_lora, unusable_lora
from text2img.errors import ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from text2img.prompts import Request


if TYPE_CHECKING:
    LayerKey = tuple[int, str]
    LayerPath = tuple[Any, str, Any]
    """A module's parent, its name in the parent, and peft's layer for it."""
    Active = tuple[tuple[str, float], ...]
    """peft's names of the active adapters, each with its weight."""

_RANKS: Final = (8, 32, 128)
"""The ranks of buffers. Each step up compiles again, and rank that is not used costs time."""


class LoraCapacity(NamedTuple):
    """The size of the buffers: LoRAs of ``rank`` in total, at each of ``layers`` layers.

    It is false without buffers, when the denoiser runs as it was loaded.
    """

    rank: int = 0
    layers: int = 0

    def __bool__(self) -> bool:
        return self.rank > 0


class LoraPair(NamedTuple):
    """A LoRA at one layer: its lower half (rank, inputs, …), upper half (outputs, rank, …) and weight."""

    down: Any
    up: Any
    weight: float


class LoraBufferPool:
    """The LoRA buffers of one denoiser.

    They grow on demand and never shrink: every change of size compiles the denoiser again.
    """

    def __init__(self) -> None:
        self._capacity = LoraCapacity()
        self._layer_keys: set[LayerKey] = set()
        self._buffers: dict[LayerKey, LoraBuffer] = {}
        self._filled: tuple[LoraCapacity, Active] | None = None

    def capacity(self, layers: Mapping[LayerKey, LayerPath], active: Active) -> LoraCapacity | None:
        """Return the capacity that these LoRAs run with, grown if needed; None if no buffer can hold them.

        It is ``LoraCapacity()`` for LoRAs that do not change the denoiser.
        """
        pairs = {key: _pairs(layer, active) for key, layer in layers.items()}
        ranks = {key: sum(pair.down.shape[0] for pair in pairs[key]) for key in layers if pairs[key]}
        if not ranks:
            return LoraCapacity()
        rank = next((rank for rank in _RANKS if rank >= max(self._capacity.rank, *ranks.values())), None)
        if rank is None or not all(_can_wrap(layers[key][2].get_base_layer()) for key in ranks):
            return None
        self._layer_keys |= ranks.keys()
        self._capacity = LoraCapacity(rank, len(self._layer_keys))
        return self._capacity

    @contextlib.contextmanager
    def installed(self, layers: Mapping[LayerKey, LayerPath], active: Active) -> Iterator[None]:
        """Run the block with these LoRAs in buffers, then restore the modules.

        Raises ValueError if no buffer can hold them.
        """
        capacity = self.capacity(layers, active)
        if capacity is None:
            raise ValueError("no buffers can hold these LoRAs")
        if capacity:
            self._fill(layers, active)
        before = [(parent, name, getattr(parent, name)) for parent, name, _ in layers.values()]
        try:
            for key, (parent, name, layer) in layers.items():
                buffer = self._buffers.get(key) if capacity else None
                parent.register_module(name, layer.get_base_layer() if buffer is None else buffer)
            yield
        finally:
            for parent, name, module in before:
                parent.register_module(name, module)

    def _fill(self, layers: Mapping[LayerKey, LayerPath], active: Active) -> None:
        """Copy the LoRAs' weights into the buffers, unless they are there already."""
        if self._filled == (self._capacity, active):
            return
        if self._filled is None or self._filled[0] != self._capacity:
            self._filled, self._buffers = None, {}  # free the smaller buffers before allocating larger ones
            self._buffers = {
                key: LoraBuffer(layers[key][2].get_base_layer(), self._capacity.rank)
                for key in self._layer_keys
            }
        self._filled = None  # a failure halfway must not leave the buffers marked as filled
        for key, buffer in self._buffers.items():
            buffer.fill(_pairs(layers[key], active))
        self._filled = self._capacity, active


class LoraBuffer(torch.nn.Module):  # type: ignore[misc]
    """A layer (linear or 2D convolution) with a LoRA of ``rank`` added to it, initially zeros."""

    def __init__(self, layer: Any, rank: int) -> None:
        super().__init__()
        outputs, *inputs = layer.weight.shape
        self.layer = layer
        self.register_buffer("down", layer.weight.new_zeros(rank, *inputs), persistent=False)
        self.register_buffer(
            "up", layer.weight.new_zeros(outputs, rank, *[1] * len(inputs[1:])), persistent=False
        )

    @property
    def weight(self) -> Any:
        """The layer's own weight: some blocks read its dtype."""
        return self.layer.weight

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def fill(self, pairs: Sequence[LoraPair]) -> None:
        """Replace the LoRA with the sum of these products; their ranks must add up to at most ``rank``."""
        self.down.zero_()
        self.up.zero_()
        start = 0
        for down, up, weight in pairs:
            end = start + down.shape[0]
            self.down[start:end] = down
            self.up[:, start:end] = up * weight
            start = end

    def forward(self, values: Any) -> Any:
        """Return the layer's output plus the LoRAs' product."""
        if self.up.ndim == 2:
            hidden = torch.nn.functional.linear(values, self.down)
            return self.layer(values) + torch.nn.functional.linear(hidden, self.up)
        layer = self.layer
        hidden = torch.nn.functional.conv2d(
            values, self.down, None, layer.stride, layer.padding, layer.dilation
        )
        return layer(values) + torch.nn.functional.conv2d(hidden, self.up)


def _pairs(path: LayerPath, active: Active) -> list[LoraPair]:
    """Return the pairs of the active adapters that change this layer."""
    _, _, layer = path
    return [
        LoraPair(layer.lora_A[name].weight, layer.lora_B[name].weight, weight)
        for name, weight in active
        if name in layer.lora_A
    ]


def _can_wrap(layer: Any) -> bool:
    """Return True if a LoraBuffer can replace the layer."""
    if type(layer) is torch.nn.Conv2d:
        return bool(layer.groups == 1 and layer.padding_mode == "zeros")
    return type(layer) is torch.nn.Linear


if TYPE_CHECKING:
    Stamp = tuple[str, int, int]

logger = logging.getLogger(__name__)

MAX_BYTES: Final = 2**30
"""Bytes of adapters that stay loaded: about 160 of rank 16 for Stable Diffusion 1's UNet in fp16. Those of
the current request stay loaded even beyond it."""
MAX_ADAPTERS: Final = 32
"""The number of adapters that stay loaded, whatever their size."""
MAX_UNUSABLE: Final = 1_000
"""The number of unusable files that are remembered, so as not to read them again; the oldest is dropped."""


@dataclass(frozen=True, slots=True)
class _Adapter:
    """An adapter: peft's ``name``, its size in ``bytes``, and whether it ``changes_text`` encoding."""

    name: str
    bytes: int
    changes_text: bool


class Adapters:
    """The LoRA adapters of one pipeline, used only from the thread that owns the device."""

    def __init__(self, pipe: Any, max_bytes: int = MAX_BYTES, max_adapters: int = MAX_ADAPTERS) -> None:
        self._pipe, self._max_bytes, self._max_adapters = pipe, max_bytes, max_adapters
        self._buffers = LoraBufferPool()
        self._loaded: OrderedDict[Stamp, _Adapter] = OrderedDict()
        self._unusable: OrderedDict[Stamp, tuple[ErrorCode, str]] = OrderedDict()
        self._layers: defaultdict[str, dict[LayerKey, LayerPath]] = defaultdict(dict)
        self._active: tuple[tuple[_Adapter, float], ...] = ()
        self._created = 0
        # peft marks the weights below its layers as not trained, and that change would compile them again.
        # None is trained here, so mark all of them now.
        for name in getattr(pipe, "_lora_loadable_modules", ()):
            if getattr(pipe, name, None) is not None:
                getattr(pipe, name).requires_grad_(requires_grad=False)

    @property
    def text_lora_key(self) -> Hashable:
        """The cache key of the active LoRAs that change text encoding: equal keys encode a text alike."""
        return tuple((adapter.name, weight) for adapter, weight in self._active if adapter.changes_text)

    def capacity(self) -> LoraCapacity | None:
        """Return the capacity that selects, with a batch's shape, the compiled code for the active LoRAs.

        See LoraBufferPool.capacity.
        """
        return self._buffers.capacity(*self._denoiser_layers())

    def use_buffers(self) -> AbstractContextManager[None]:
        """Return a context in which the active LoRAs are in the compiled denoiser's buffers.

        See LoraBufferPool.installed.
        """
        return self._buffers.installed(*self._denoiser_layers())

    def _denoiser_layers(self) -> tuple[dict[LayerKey, LayerPath], Active]:
        denoisers = (layers for name, layers in self._layers.items() if not _is_text_encoder(name))
        layers = {key: path for denoiser in denoisers for key, path in denoiser.items()}
        return layers, tuple((adapter.name, weight) for adapter, weight in self._active)

    @property
    def names(self) -> list[str]:
        """The names of the loaded adapters, the least recently used first."""
        return [adapter.name for adapter in self._loaded.values()]

    def use(self, request: Request) -> None:
        """Activate the request's LoRAs at their weights, and no others.

        ``lora_files`` are their files on this machine. Raises PromptFailed (``lora_failed``) for a LoRA that
        cannot be used; then none is active.
        """
        loras = request.parameters.loras
        stamps = [_stamp_of(file) for file in request.lora_files]
        if len(stamps) != len(loras):
            raise unusable_lora("it was not fetched")
        weighted: tuple[tuple[_Adapter, float], ...] = ()
        try:
            adapters = [self._adapter_at(index, stamps) for index in range(len(stamps))]
            weights: dict[_Adapter, float] = defaultdict(float)  # two paths may lead to one file
            for adapter, lora in zip(adapters, loras, strict=True):
                weights[adapter] += lora.weight
            weighted = tuple(weights.items())
        finally:
            self._set_active(weighted)
        self._unload_unused(stamps)

    def _set_active(self, weighted: tuple[tuple[_Adapter, float], ...]) -> None:
        if weighted == self._active:
            return
        if weighted:
            self._attach_layers()
            self._pipe.set_adapters(
                [adapter.name for adapter, _ in weighted], [weight for _, weight in weighted]
            )
        else:
            self._detach_layers()
        self._active = weighted

    def _adapter_at(self, index: int, stamps: Sequence[Stamp]) -> _Adapter:
        """Return the adapter of the file at ``index``; with several files, errors name the LoRA's number."""
        try:
            return self._get(stamps[index])
        except PromptFailed as exc:
            if len(stamps) == 1:
                raise
            raise PromptFailed(exc.code, f"lora {index + 1}: {exc}") from exc

    def _get(self, stamp: Stamp) -> _Adapter:
        """Return the adapter of that file, and load it if necessary."""
        if stamp in self._unusable:
            raise PromptFailed(*self._unusable[stamp])
        if stamp not in self._loaded:
            try:
                self._loaded[stamp] = self._load(stamp[0])
            except Exception as exc:
                if classify_error(exc) is FailureKind.OTHER:
                    failure = _as_prompt_failure(exc)
                    # Do not keep the exception: its traceback would keep the weights in memory.
                    self._unusable[stamp] = failure.code, str(failure)
                    if len(self._unusable) > MAX_UNUSABLE:
                        self._unusable.popitem(last=False)
                    raise failure from exc
                raise
        self._loaded.move_to_end(stamp)
        return self._loaded[stamp]

    def _load(self, file: str) -> _Adapter:
        if not hasattr(self._pipe, "lora_state_dict"):
            raise unusable_lora("models of this kind do not support LoRAs")
        weights = read_lora(file, self._pipe)
        self._created += 1
        name = f"adapter_{self._created:06d}"
        named = {
            f"{component}.{key}": value
            for component, tensors in weights.items()
            for key, value in tensors.items()
        }
        self._attach_layers()
        self._active = ()  # loading activates the new adapter as well as the others
        try:
            self._pipe.load_lora_weights(named, adapter_name=name)
            self._record_layers(weights)
            self._check_loaded(name, weights)
        except BaseException:
            self._record_layers(weights)
            self._pipe.delete_adapters(name)
            self._detach_layers()
            raise
        size = sum(value.nbytes for value in named.values())
        logger.info("loaded a LoRA of %d weights, %.1f MB", len(named), size / 1e6)
        return _Adapter(name, size, any(map(_is_text_encoder, weights)))

    def _check_loaded(self, name: str, weights: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise PromptFailed unless the adapter in the model equals the file's weights, one by one."""
        for component, tensors in weights.items():
            model, count = getattr(self._pipe, component), 0
            for layer in (layer for layer in model.modules() if name in getattr(layer, "lora_A", ())):
                count += 2
                if layer.scaling[name] != 1:
                    raise unusable_lora("the model changed its scale when loading it")
            for key, value in tensors.items():
                path, half = key.removesuffix(".weight").rsplit(".", 1)
                weight = getattr(model.get_submodule(path), half)[name].weight
                if weight.dtype != value.dtype or not weight.equal(value.to(weight.device)):
                    raise unusable_lora(f"the model changed {component}.{key[:120]} when loading it")
            if count != len(tensors):
                raise unusable_lora(f"the model loaded {count} of its {len(tensors)} weights")

    def _record_layers(self, components: Iterable[str]) -> None:
        """Record the layers that peft has inserted into the components."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for component in components:
            for parent in list(getattr(self._pipe, component).modules()):
                for name, child in parent.named_children():
                    if isinstance(child, BaseTunerLayer):
                        self._layers[component][id(parent), name] = parent, name, child

    def _attach_layers(self) -> None:
        """Insert peft's layers into the model, in place of the modules they wrap."""
        for parent, name, layer in self._peft_layers():
            parent.register_module(name, layer)

    def _detach_layers(self) -> None:
        """Restore the modules that peft's layers wrap."""
        for parent, name, layer in self._peft_layers():
            parent.register_module(name, layer.get_base_layer())

    def _peft_layers(self) -> Iterator[LayerPath]:
        return chain.from_iterable(layers.values() for layers in self._layers.values())

    def _unload_unused(self, keep: Sequence[Stamp]) -> None:
        """Unload the least recently used adapters beyond the limits, but none of those in ``keep``."""
        total = sum(adapter.bytes for adapter in self._loaded.values())
        for stamp in [stamp for stamp in self._loaded if stamp not in keep]:
            if total <= self._max_bytes and len(self._loaded) <= self._max_adapters:
                return
            adapter = self._loaded.pop(stamp)
            total -= adapter.bytes
            self._attach_layers()
            self._pipe.delete_adapters(adapter.name)
            if not self._active:
                self._detach_layers()


def _stamp_of(file: str) -> Stamp:
    """Return the file's path, size and modification time, which identify its content."""
    try:
        stat = Path(file).stat()
    except OSError as exc:
        # Most likely the cache has evicted it; the next attempt fetches it again.
        message = f"the LoRA's file cannot be read ({exc.strerror})"
        raise PromptFailed(ErrorCode.GENERATION_FAILED, message) from exc
    return str(file), stat.st_size, stat.st_mtime_ns  # not the cache's own path: it may evict the file again


def _is_text_encoder(component: str) -> bool:
    return component.startswith("text_encoder")


def _as_prompt_failure(exc: Exception) -> PromptFailed:
    return exc if isinstance(exc, PromptFailed) else unusable_lora(one_line(exc)[:200])
