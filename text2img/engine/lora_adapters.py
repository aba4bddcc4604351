"""LoRAs in a compiled denoiser: a slot beside each layer that they reach, and their weights copied into it.

To the compiler each set of adapters is a model of its own. Yet all that several LoRAs add to a layer is one
product of two matrices: their lower halves one below the other, and side by side their upper halves, times
their weights. In slots of one rank, filled up with zeros, every set is the same model with other numbers in
it. Knows of peft's layers where they stand and what they hold; loads nothing and does not compile.

Imports torch: to be imported only where there is a pipeline.
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
from text2img.engine.lora_weights import read_lora, refused
from text2img.errors import ErrorCode, PromptFailed

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from text2img.prompts import Request


if TYPE_CHECKING:
    Key = tuple[int, str]
    LayerPath = tuple[Any, str, Any]
    """A module's parent, its name there, and peft's layer for it."""
    Active = tuple[tuple[str, float], ...]
    """Adapters by peft's names for them, each with its weight."""

_RANKS: Final = (8, 32, 128)
"""Ranks that slots have: each step compiles anew, and what is not needed of a rank costs time."""


class LoraCapacity(NamedTuple):
    """What slots hold: LoRAs of ``rank`` in all, at each of ``layers`` layers. False where there are none,
    and the denoiser is the one that was loaded.
    """

    rank: int = 0
    layers: int = 0

    def __bool__(self) -> bool:
        return self.rank > 0


class LoraPair(NamedTuple):
    """A LoRA at one layer: its lower half (rank, inputs, …), its upper one (outputs, rank, …), its weight."""

    down: Any
    up: Any
    weight: float


class LoraBufferPool:
    """The slots of one denoiser. They grow with what is asked of them and never shrink, as each other size
    is another model to the compiler.
    """

    def __init__(self) -> None:
        self._room = LoraCapacity()
        self._reached: set[Key] = set()
        self._slots: dict[Key, LoraBuffer] = {}
        self._held: tuple[LoraCapacity, Active] | None = None

    def room(self, places: Mapping[Key, LayerPath], active: Active) -> LoraCapacity | None:
        """The room in which these LoRAs run, grown where they need more; None where no slot can hold them.

        ``Room()`` for those that do not reach into the denoiser.
        """
        halves = {key: _halves(place, active) for key, place in places.items()}
        ranks = {key: sum(half.down.shape[0] for half in halves[key]) for key in places if halves[key]}
        if not ranks:
            return LoraCapacity()
        rank = next((rank for rank in _RANKS if rank >= max(self._room.rank, *ranks.values())), None)
        if rank is None or not all(_plain(places[key][2].get_base_layer()) for key in ranks):
            return None
        self._reached |= ranks.keys()
        self._room = LoraCapacity(rank, len(self._reached))
        return self._room

    @contextlib.contextmanager
    def standing(self, places: Mapping[Key, LayerPath], active: Active) -> Iterator[None]:
        """Within it these LoRAs stand in slots; afterwards all is as before. There must be room for them."""
        room = self.room(places, active)
        if room is None:
            raise ValueError("no slots can hold these LoRAs")
        if room:
            self._fill(places, active)
        before = [(parent, name, getattr(parent, name)) for parent, name, _ in places.values()]
        try:
            for key, (parent, name, layer) in places.items():
                slot = self._slots.get(key) if room else None
                parent.register_module(name, layer.get_base_layer() if slot is None else slot)
            yield
        finally:
            for parent, name, module in before:
                parent.register_module(name, module)

    def _fill(self, places: Mapping[Key, LayerPath], active: Active) -> None:
        """Copy into the slots what these LoRAs hold, unless it is in them."""
        if self._held == (self._room, active):
            return
        if self._held is None or self._held[0] != self._room:
            self._held, self._slots = None, {}  # the smaller ones' memory first
            self._slots = {
                key: LoraBuffer(places[key][2].get_base_layer(), self._room.rank) for key in self._reached
            }
        self._held = None  # until all of it is there
        for key, slot in self._slots.items():
            slot.hold(_halves(places[key], active))
        self._held = self._room, active


class LoraBuffer(torch.nn.Module):  # type: ignore[misc]
    """A layer (linear, or a convolution over pictures) with a LoRA of ``rank`` beside it, zeros at first."""

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
        """The layer's own weight, as some blocks ask for its dtype."""
        return self.layer.weight

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def hold(self, halves: Sequence[LoraPair]) -> None:
        """Add from now on the sum of these products; their ranks sum up to no more than the slot's."""
        self.down.zero_()
        self.up.zero_()
        start = 0
        for down, up, weight in halves:
            end = start + down.shape[0]
            self.down[start:end] = down
            self.up[:, start:end] = up * weight
            start = end

    def forward(self, values: Any) -> Any:
        """What the layer makes of the values, and what the LoRAs add to it."""
        if self.up.ndim == 2:
            added = torch.nn.functional.linear(values, self.down)
            return self.layer(values) + torch.nn.functional.linear(added, self.up)
        layer = self.layer
        added = torch.nn.functional.conv2d(
            values, self.down, None, layer.stride, layer.padding, layer.dilation
        )
        return layer(values) + torch.nn.functional.conv2d(added, self.up)


def _halves(place: LayerPath, active: Active) -> list[LoraPair]:
    """What those that reach this place hold for it."""
    _, _, layer = place
    return [
        LoraPair(layer.lora_A[name].weight, layer.lora_B[name].weight, weight)
        for name, weight in active
        if name in layer.lora_A
    ]


def _plain(layer: Any) -> bool:
    """Whether a slot can stand in the layer's place."""
    if type(layer) is torch.nn.Conv2d:
        return bool(layer.groups == 1 and layer.padding_mode == "zeros")
    return type(layer) is torch.nn.Linear


if TYPE_CHECKING:
    Stamp = tuple[str, int, int]

logger = logging.getLogger(__name__)

ROOM: Final = 2**30
"""Bytes of adapters that stay loaded: some 160 of rank 16 for Stable Diffusion 1's UNet in fp16. Those that
one picture asks for are loaded in any case."""
MOST: Final = 32
"""Adapters that stay loaded, however small they are."""
REMEMBERED: Final = 1_000
"""Files that are known to be of no use, so that they are not read again; the oldest is forgotten first."""


@dataclass(frozen=True, slots=True)
class _Adapter:
    """``name`` is peft's; ``bytes`` is what it takes; ``reads``: whether it changes how texts are read."""

    name: str
    bytes: int
    reads: bool


class Adapters:
    """The LoRAs of one pipeline, used from the thread that owns the device."""

    def __init__(self, pipe: Any, room: int = ROOM, most: int = MOST) -> None:

        self._pipe, self._room, self._most = pipe, room, most
        self._slots = LoraBufferPool()
        self._loaded: OrderedDict[Stamp, _Adapter] = OrderedDict()
        self._unusable: OrderedDict[Stamp, tuple[ErrorCode, str]] = OrderedDict()
        self._layers: defaultdict[str, dict[Key, LayerPath]] = defaultdict(dict)
        self._active: tuple[tuple[_Adapter, float], ...] = ()
        self._made = 0
        # peft says of weights that it stands before that they are not trained; to the compiler they are then
        # other weights. None is trained here, so that it is said of all of them before.
        for name in getattr(pipe, "_lora_loadable_modules", ()):
            if getattr(pipe, name, None) is not None:
                getattr(pipe, name).requires_grad_(requires_grad=False)

    @property
    def text_lora_key(self) -> Hashable:
        """What decides, beside a text, how it is read now: equal voices read equal texts alike."""
        return tuple((adapter.name, weight) for adapter, weight in self._active if adapter.reads)

    def room(self) -> LoraCapacity | None:
        """What decides, beside a batch's shape, which compiled code the active LoRAs run on; see Slots."""
        return self._slots.room(*self._in_denoiser())

    def use_buffers(self) -> AbstractContextManager[None]:
        """Within it the active LoRAs stand in the denoiser as its compiled code wants them; see Slots."""
        return self._slots.standing(*self._in_denoiser())

    def _in_denoiser(self) -> tuple[dict[Key, LayerPath], Active]:
        parts = (places for part, places in self._layers.items() if not _reads(part))
        places = {key: place for part in parts for key, place in part.items()}
        return places, tuple((adapter.name, weight) for adapter, weight in self._active)

    @property
    def names(self) -> list[str]:
        """The adapters that are loaded, the least recently used first."""
        return [adapter.name for adapter in self._loaded.values()]

    def use(self, request: Request) -> None:
        """From now on draw with the request's LoRAs, at their weights, and with no others.

        Its ``lora_files`` are where they are on this machine. Raises PromptFailed (``lora_failed``) for one
        that cannot be used: then none is active.
        """
        loras = request.parameters.loras
        stamps = [_stamp(file) for file in request.lora_files]
        if len(stamps) != len(loras):
            raise refused("it was not fetched")
        wanted: tuple[tuple[_Adapter, float], ...] = ()
        try:
            adapters = [self._numbered(number, stamps) for number in range(len(stamps))]
            weights: dict[_Adapter, float] = defaultdict(float)  # two paths may lead to one file
            for adapter, lora in zip(adapters, loras, strict=True):
                weights[adapter] += lora.weight
            wanted = tuple(weights.items())
        finally:
            self._activate(wanted)
        self._forget(stamps)

    def _activate(self, wanted: tuple[tuple[_Adapter, float], ...]) -> None:
        if wanted == self._active:
            return
        if wanted:
            self._put(layers=True)
            self._pipe.set_adapters([adapter.name for adapter, _ in wanted], [weight for _, weight in wanted])
        else:
            self._put(layers=False)
        self._active = wanted

    def _numbered(self, number: int, stamps: Sequence[Stamp]) -> _Adapter:
        """The adapter of one of the files; where it fails and there are several, it is said which."""
        try:
            return self._get(stamps[number])
        except PromptFailed as exc:
            if len(stamps) == 1:
                raise
            raise PromptFailed(exc.code, f"lora {number + 1}: {exc}") from exc

    def _get(self, stamp: Stamp) -> _Adapter:
        """The adapter of that file, loaded where it is not yet."""
        if stamp in self._unusable:
            raise PromptFailed(*self._unusable[stamp])
        if stamp not in self._loaded:
            try:
                self._loaded[stamp] = self._load(stamp[0])
            except Exception as exc:
                if classify_error(exc) is FailureKind.OTHER:
                    failure = _explained(exc)
                    # Not the exception: by its traceback it would keep the weights that were read.
                    self._unusable[stamp] = failure.code, str(failure)
                    if len(self._unusable) > REMEMBERED:
                        self._unusable.popitem(last=False)
                    raise failure from exc
                raise
        self._loaded.move_to_end(stamp)
        return self._loaded[stamp]

    def _load(self, file: str) -> _Adapter:
        if not hasattr(self._pipe, "lora_state_dict"):
            raise refused("a model of this kind takes none")
        parts = read_lora(file, self._pipe)
        self._made += 1
        name = f"adapter_{self._made:06d}"
        named = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
        self._put(layers=True)
        self._active = ()  # loading makes the new one active beside the others
        try:
            self._pipe.load_lora_weights(named, adapter_name=name)
            self._keep_layers(parts)
            self._check(name, parts)
        except BaseException:
            self._keep_layers(parts)
            self._pipe.delete_adapters(name)
            self._put(layers=False)
            raise
        size = sum(value.nbytes for value in named.values())
        logger.info("loaded a LoRA of %d weights, %.1f MB", len(named), size / 1e6)
        return _Adapter(name, size, any(map(_reads, parts)))

    def _check(self, name: str, parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Raise unless the adapter in the model is, weight by weight, what was read, and nothing else."""
        for part, values in parts.items():
            component, found = getattr(self._pipe, part), 0
            for layer in (layer for layer in component.modules() if name in getattr(layer, "lora_A", ())):
                found += 2
                if layer.scaling[name] != 1:
                    raise refused("its scale was not taken as it is")
            for key, value in values.items():
                path, half = key.removesuffix(".weight").rsplit(".", 1)
                weight = getattr(component.get_submodule(path), half)[name].weight
                if weight.dtype != value.dtype or not weight.equal(value.to(weight.device)):
                    raise refused(f"{part}.{key[:120]} was not taken as it is")
            if found != len(values):
                raise refused(f"{found} weights came of the {len(values)} in its file")

    def _keep_layers(self, parts: Mapping[str, Any]) -> None:
        """Remember where peft has put its layers."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for part in parts:
            for parent in list(getattr(self._pipe, part).modules()):
                for name, child in parent.named_children():
                    if isinstance(child, BaseTunerLayer):
                        self._layers[part][id(parent), name] = parent, name, child

    def _put(self, *, layers: bool) -> None:
        """Put peft's layers into the model, or the modules in whose places they stand."""
        for parent, name, layer in chain.from_iterable(part.values() for part in self._layers.values()):
            parent.register_module(name, layer if layers else layer.get_base_layer())

    def _forget(self, keep: Sequence[Stamp]) -> None:
        """Unload the least recently used of those that are too many, but none of those to keep."""
        held = sum(adapter.bytes for adapter in self._loaded.values())
        for stamp in [stamp for stamp in self._loaded if stamp not in keep]:
            if held <= self._room and len(self._loaded) <= self._most:
                return
            adapter = self._loaded.pop(stamp)
            held -= adapter.bytes
            self._put(layers=True)
            self._pipe.delete_adapters(adapter.name)
            self._put(layers=bool(self._active))


def _stamp(file: str) -> Stamp:
    """The file, and what changes with its content."""
    try:
        stat = Path(file).stat()
    except OSError as exc:
        # Most likely it had to leave the cache: the next attempt fetches it anew.
        message = f"the LoRA's file cannot be read ({exc.strerror})"
        raise PromptFailed(ErrorCode.GENERATION_FAILED, message) from exc
    return file, stat.st_size, stat.st_mtime_ns


def _reads(part: str) -> bool:
    """Whether the pipeline's component of that name reads texts."""
    return part.startswith("text_encoder")


def _explained(exc: Exception) -> PromptFailed:
    return exc if isinstance(exc, PromptFailed) else refused(one_line(exc)[:200])
