"""Reports on a run: gallery, comparison, contact sheets, and the files next to the images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator


_JSON: Final = {"allow_nan": False, "separators": (",", ":")}
"""How ``tojson`` writes values: compact, in the order of their members."""


def render(package: str, **values: object) -> Iterator[str]:
    """Yield the page of a package, whose template is ``page/page.html`` in it, piece by piece.

    Text is escaped. An iterator among the values is advanced as the page is yielded, so that a page may be
    larger than the memory. A value that the template needs and that is missing raises an exception.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(package, "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = _JSON
    return environment.get_template("page.html").generate(values)
