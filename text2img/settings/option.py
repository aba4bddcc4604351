"""An option: what people are shown of it, and how a class of options declares one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Option:
    """An option as people meet it. ``default`` is shown where the field's own default does not say it.

    ``also``: further variables that say the same, where ``variable`` says nothing.
    """

    name: str
    flag: str
    variable: str
    group: str
    meaning: str
    default: object
    secret: bool
    shown: str | None
    also: tuple[str, ...] = ()

    @property
    def switch(self) -> bool:
        """Whether the flag alone says yes."""
        return isinstance(self.default, bool)

    @property
    def default_shown(self) -> str:
        """The default as help and README show it."""
        if self.shown is not None:
            return self.shown
        return "–" if self.default is None else str(self.default)


def option(default: Any, group: str, meaning: str, **more: Any) -> Any:
    """A field of a class of options: its default, the group it is listed in, what it means."""
    return field(default=default, metadata={"group": group, "meaning": meaning, **more})


def declared_in(settings: Any) -> Iterator[Option]:
    """The options of a class, in the order of their declaration."""
    for declared in dataclasses.fields(settings):
        more = declared.metadata
        yield Option(
            name=declared.name,
            flag="--" + declared.name.replace("_", "-"),
            variable=more.get("variable", declared.name.upper()),
            group=more["group"],
            meaning=more["meaning"],
            default=declared.default,
            secret=more.get("secret", False),
            shown=more.get("shown"),
            also=more.get("also", ()),
        )
