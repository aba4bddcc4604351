"""A list in a YAML text of any length → its entries, one by one, each with its line.

The parser's events are composed entry by entry, by libyaml where PyYAML has it. What has an anchor stays in
memory, since an alias may name it. Does not know what an entry may hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import yaml
from yaml.composer import Composer, ComposerError
from yaml.parser import ParserError
from yaml.scanner import ScannerError

from text2img.intake.formats import NOT_A_LIST

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

_SEQUENCE: Final = "tag:yaml.org,2002:seq"
_MAPPING: Final = "tag:yaml.org,2002:map"


if yaml.__with_libyaml__:

    class _Loader(yaml.CSafeLoader, Composer):
        """libyaml's parser and the composer that is told where to begin; libyaml's own composes documents."""

        def __init__(self, file: TextIO) -> None:
            yaml.CSafeLoader.__init__(self, file)
            Composer.__init__(self)

else:
    _Loader = yaml.SafeLoader  # type: ignore[misc, assignment]


def entries(file: TextIO) -> Iterator[tuple[int, object]]:
    """The entries of a list, or of the list under ``prompts``, with their lines.

    Raises ValueError and yaml.YAMLError.
    """
    try:
        yield from _entries(_Loader(file))
    except (ParserError, ScannerError):
        file.seek(0)
        for _ in _entries(yaml.SafeLoader(file)):  # slower, but it finds the very line
            pass
        raise


def _entries(loader: Any) -> Iterator[tuple[int, object]]:
    try:
        loader.get_event()
        if loader.check_event(yaml.StreamEndEvent):
            raise ValueError(NOT_A_LIST)
        loader.get_event()  # the document's start
        root = loader.peek_event()
        mapping = isinstance(root, yaml.MappingStartEvent) and root.tag in {None, "!", _MAPPING}
        yield from _under_prompts(loader) if mapping else _list(loader)
        loader.get_event()  # the document's end
        if not loader.check_event(yaml.StreamEndEvent):
            mark = loader.peek_event().start_mark
            raise ComposerError(None, None, "found another document", mark)
    finally:
        loader.dispose()


def _under_prompts(loader: Any) -> Iterator[tuple[int, object]]:
    loader.get_event()
    found = False
    while not loader.check_event(yaml.MappingEndEvent):
        key = loader.compose_node(None, None)
        if not isinstance(key, yaml.ScalarNode) or key.value != "prompts":
            loader.compose_node(None, None)  # for its anchors
            continue
        if found:
            raise ComposerError(None, None, "prompts stands there twice", key.start_mark)
        found = True
        yield from _list(loader)
    loader.get_event()
    if not found:
        raise ValueError(NOT_A_LIST)


def _list(loader: Any) -> Iterator[tuple[int, object]]:
    start = loader.peek_event()
    plain = isinstance(start, yaml.SequenceStartEvent) and start.tag in {None, "!", _SEQUENCE}
    if not plain or start.anchor is not None:
        yield from _whole(loader)
        return
    loader.get_event()
    while not loader.check_event(yaml.SequenceEndEvent):
        line = loader.peek_event().start_mark.line + 1
        yield line, loader.construct_document(loader.compose_node(None, None))
    loader.get_event()


def _whole(loader: Any) -> Iterator[tuple[int, object]]:
    """The entries of a list that other places name, or have named; it is in memory as a whole."""
    node = loader.compose_node(None, None)
    entries = loader.construct_document(node)
    if not isinstance(node, yaml.SequenceNode) or not isinstance(entries, list):
        raise ValueError(NOT_A_LIST)  # noqa: TRY004 - a wrong value of a file, no type
    for child, entry in zip(node.value, entries, strict=True):
        yield child.start_mark.line + 1, entry
