"""Schedulers by name, each made from the model's own configuration and kept.

``Euler`` and the others are diffusers' implementations; what each name stands for is in ``families``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from text2img.engine.families import SHORT_NAMES

if TYPE_CHECKING:
    from collections.abc import Mapping

_SD_VALUES: Final = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "skip_prk_steps": True,
}
"""What Stable Diffusion was published with, for schedulers whose own defaults are others and where the
model's configuration is silent: DDIM's default would clip latents to [-1, 1]."""


class Schedulers:
    """A model's schedulers. ``own`` is the one it came with; it and its configuration are never changed."""

    def __init__(self, own: Any, *, flow: bool) -> None:
        self._own = own
        self._flow = flow
        self._made: dict[str, Any] = {}

    def get(self, name: str | None) -> Any:
        """The scheduler of that name, or with None the model's own; the same object each time.

        A scheduler forgets its last run when a pipeline sets its timesteps, so that it can be used again.
        """
        if name is None or SHORT_NAMES.get(type(self._own).__name__) == name:
            return self._own
        if name not in self._made:
            import diffusers

            scheduler = getattr(diffusers, _class_name(name, flow=self._flow))
            self._made[name] = scheduler.from_config(self._config(self._own.config))
        return self._made[name]

    def _config(self, own: Mapping[str, Any]) -> dict[str, Any]:
        return dict(own) if self._flow else {**_SD_VALUES, **own}


def _class_name(name: str, *, flow: bool) -> str:
    return next(
        class_name
        for class_name, short in SHORT_NAMES.items()
        if short == name and class_name.startswith("FlowMatch") == flow
    )
