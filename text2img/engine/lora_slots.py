"""LoRAs in a compiled denoiser: a slot beside each layer that they reach, and their weights copied into it.

To the compiler each set of adapters is a model of its own. Yet all that several LoRAs add to a layer is one
product of two matrices: their lower halves one below the other, and side by side their upper halves, times
their weights. In slots of one rank, filled up with zeros, every set is the same model with other numbers in
it. Knows of peft's layers where they stand and what they hold; loads nothing and does not compile.

Imports torch: to be imported only where there is a pipeline.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Key = tuple[int, str]
    Place = tuple[Any, str, Any]
    """A module's parent, its name there, and peft's layer for it."""
    Active = tuple[tuple[str, float], ...]
    """Adapters by peft's names for them, each with its weight."""

_RANKS: Final = (8, 32, 128)
"""Ranks that slots have: each step compiles anew, and what is not needed of a rank costs time."""


class Room(NamedTuple):
    """What slots hold: LoRAs of ``rank`` in all, at each of ``layers`` layers. False where there are none,
    and the denoiser is the one that was loaded.
    """

    rank: int = 0
    layers: int = 0

    def __bool__(self) -> bool:
        return self.rank > 0


class Halves(NamedTuple):
    """A LoRA at one layer: its lower half (rank, inputs, …), its upper one (outputs, rank, …), its weight."""

    down: Any
    up: Any
    weight: float


class Slots:
    """The slots of one denoiser. They grow with what is asked of them and never shrink, as each other size
    is another model to the compiler.
    """

    def __init__(self) -> None:
        self._room = Room()
        self._reached: set[Key] = set()
        self._slots: dict[Key, Slot] = {}
        self._held: tuple[Room, Active] | None = None

    def room(self, places: Mapping[Key, Place], active: Active) -> Room | None:
        """The room in which these LoRAs run, grown where they need more; None where no slot can hold them.

        ``Room()`` for those that do not reach into the denoiser.
        """
        halves = {key: _halves(place, active) for key, place in places.items()}
        ranks = {key: sum(half.down.shape[0] for half in halves[key]) for key in places if halves[key]}
        if not ranks:
            return Room()
        rank = next((rank for rank in _RANKS if rank >= max(self._room.rank, *ranks.values())), None)
        if rank is None or not all(_plain(places[key][2].get_base_layer()) for key in ranks):
            return None
        self._reached |= ranks.keys()
        self._room = Room(rank, len(self._reached))
        return self._room

    @contextlib.contextmanager
    def standing(self, places: Mapping[Key, Place], active: Active) -> Iterator[None]:
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

    def _fill(self, places: Mapping[Key, Place], active: Active) -> None:
        """Copy into the slots what these LoRAs hold, unless it is in them."""
        if self._held == (self._room, active):
            return
        if self._held is None or self._held[0] != self._room:
            self._held, self._slots = None, {}  # the smaller ones' memory first
            self._slots = {
                key: Slot(places[key][2].get_base_layer(), self._room.rank) for key in self._reached
            }
        self._held = None  # until all of it is there
        for key, slot in self._slots.items():
            slot.hold(_halves(places[key], active))
        self._held = self._room, active


class Slot(torch.nn.Module):  # type: ignore[misc]
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
    def hold(self, halves: Sequence[Halves]) -> None:
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


def _halves(place: Place, active: Active) -> list[Halves]:
    """What those that reach this place hold for it."""
    _, _, layer = place
    return [
        Halves(layer.lora_A[name].weight, layer.lora_B[name].weight, weight)
        for name, weight in active
        if name in layer.lora_A
    ]


def _plain(layer: Any) -> bool:
    """Whether a slot can stand in the layer's place."""
    if type(layer) is torch.nn.Conv2d:
        return bool(layer.groups == 1 and layer.padding_mode == "zeros")
    return type(layer) is torch.nn.Linear
