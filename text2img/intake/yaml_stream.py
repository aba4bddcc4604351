"""Streaming parser of a list in a YAML text of any length: yields its entries with their lines.

The parser's events are composed entry by entry, with libyaml if PyYAML has it. Nodes with an anchor stay in
memory, since an alias may refer to them.
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
        """libyaml's parser with PyYAML's composer; libyaml's own composes only whole documents."""

        def __init__(self, file: TextIO) -> None:
            yaml.CSafeLoader.__init__(self, file)
            Composer.__init__(self)

else:
    _Loader = yaml.SafeLoader  # type: ignore[misc, assignment]


def entries(file: TextIO) -> Iterator[tuple[int, object]]:
    """Yield the entries of a list, or of the list under ``prompts``, with their lines.

    Raises ValueError and yaml.YAMLError.
    """
    try:
        yield from _entries(_Loader(file))
    except (ParserError, ScannerError):
        file.seek(0)
        for _ in _entries(yaml.SafeLoader(file)):  # slower, but reports the exact line
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
        yield from _mapping_entries(loader) if mapping else _list_entries(loader)
        loader.get_event()  # the document's end
        if not loader.check_event(yaml.StreamEndEvent):
            mark = loader.peek_event().start_mark
            raise ComposerError(None, None, "found another document", mark)
    finally:
        loader.dispose()


def _mapping_entries(loader: Any) -> Iterator[tuple[int, object]]:
    loader.get_event()
    found = False
    while not loader.check_event(yaml.MappingEndEvent):
        key = loader.compose_node(None, None)
        if not isinstance(key, yaml.ScalarNode) or key.value != "prompts":
            loader.compose_node(None, None)  # for its anchors
            continue
        if found:
            raise ComposerError(None, None, "prompts occurs twice", key.start_mark)
        found = True
        yield from _list_entries(loader)
    loader.get_event()
    if not found:
        raise ValueError(NOT_A_LIST)


def _list_entries(loader: Any) -> Iterator[tuple[int, object]]:
    start = loader.peek_event()
    is_list = isinstance(start, yaml.SequenceStartEvent) and start.tag in {None, "!", _SEQUENCE}
    if not is_list or start.anchor is not None:
        yield from _anchored_entries(loader)
        return
    loader.get_event()
    while not loader.check_event(yaml.SequenceEndEvent):
        line = loader.peek_event().start_mark.line + 1
        yield line, loader.construct_document(loader.compose_node(None, None))
    loader.get_event()


def _anchored_entries(loader: Any) -> Iterator[tuple[int, object]]:
    """Yield the entries of a list that has an anchor or is an alias; it is in memory as a whole."""
    node = loader.compose_node(None, None)
    entries = loader.construct_document(node)
    if not isinstance(node, yaml.SequenceNode) or not isinstance(entries, list):
        raise ValueError(NOT_A_LIST)  # noqa: TRY004 - an invalid value in a file, not a wrong type
    for child, entry in zip(node.value, entries, strict=True):
        yield child.start_mark.line + 1, entry
