"""Streaming parser of a list in a YAML text of any length: yields its entries with their lines.

The parser's events are composed entry by entry, with libyaml if PyYAML has it. Nodes with an anchor stay in
memory, since an alias may refer to them. What aliases and merges expand to is counted before it is built.
"""

from __future__ import annotations

import math
import re
from collections import ChainMap
from typing import TYPE_CHECKING, Any, Final

import yaml
from yaml.composer import Composer, ComposerError
from yaml.parser import ParserError
from yaml.scanner import ScannerError

from text2img.intake.formats import (
    MAX_DIGITS,
    NESTED_TOO_DEEPLY,
    NOT_A_LIST,
    Unreadable,
    bounded_int,
    one_line,
    repeated_keys,
)
from text2img.prompts.quoting import quoted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

_STR: Final = "tag:yaml.org,2002:str"
_INT: Final = "tag:yaml.org,2002:int"
_KINDS: Final = {
    _INT: "another number",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:bool": "true or false",
    "tag:yaml.org,2002:timestamp": "a date",
}
_IDS: Final = ("id", "_id", "dataset_id", "style_id")
_TEXTS: Final = ("text", "prompt", "negative_prompt", "artist_name")
_DECIMAL: Final = re.compile(r"-?[1-9][0-9]*|0")
_OCTAL_OR_TIME: Final = re.compile(r"[-+]?0[0-7_]+|[^:]*:.*", re.DOTALL)
_SEQUENCE: Final = "tag:yaml.org,2002:seq"
_MAPPING: Final = "tag:yaml.org,2002:map"
_MERGE: Final = "tag:yaml.org,2002:merge"
_MAX_DEPTH: Final = 50
_MAX_ENTRY_VALUES: Final = 25_000
"""The values of one entry, aliases expanded; a text of 20,000 characters has no more tags."""
_MAX_EXPANDED, _MAX_EXPANDED_PER_VALUE = 100_000, 50
"""Values that a file's aliases may expand to: a number, and one for each value in the file."""


class _BoundedComposer(Composer):
    """A composer that refuses deep nesting and large expansions, and lists the keys that occur twice.

    ``expanded`` counts the composed values, those behind an alias each time again. ``aliased`` are the nodes
    behind the aliases since it was cleared, ``shared`` the values of such nodes that are constructed already.
    """

    def start_counting(self) -> None:
        """Initialise the counters, before the first node."""
        self.expanded = 0
        self.repeated: list[tuple[Any, str]] = []
        self.aliased: set[Any] = set()
        self.shared: dict[Any, object] = {}
        self._sizes: dict[str, int] = {}
        self._written = self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return the next node, as Composer does. Raises ComposerError."""
        event: Any = self.peek_event()  # type: ignore[attr-defined]
        mark: Any = event.start_mark
        anchor, before = event.anchor, self.expanded
        self._written += 1
        if self._depth == _MAX_DEPTH:
            raise ComposerError(None, None, f"a value {NESTED_TOO_DEEPLY}", mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self.expanded += 1
            if anchor is not None:
                self._sizes[anchor] = self.expanded - before
            return node
        if anchor not in self._sizes:
            raise ComposerError(None, None, "a value contains itself", mark)
        self.aliased.add(node)
        self.expanded += self._sizes[anchor]
        if self.expanded > _MAX_EXPANDED + _MAX_EXPANDED_PER_VALUE * self._written:
            raise ComposerError(None, None, "aliases expand to too many values", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Return the mapping, as Composer does, and add its repeated keys to ``repeated``."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    self.repeated.append((key.start_mark, key.value))
                seen.add((key.tag, key.value))
        return node


class _SlowLoader(_BoundedComposer, yaml.SafeLoader):
    """PyYAML's own parser, which reports the exact line of a syntax error."""

    def __init__(self, file: TextIO) -> None:
        yaml.SafeLoader.__init__(self, file)
        self.start_counting()


if yaml.__with_libyaml__:

    class _Loader(_BoundedComposer, yaml.CSafeLoader):
        """libyaml's parser with PyYAML's composer; libyaml's own composes only whole documents."""

        def __init__(self, file: TextIO) -> None:
            yaml.CSafeLoader.__init__(self, file)
            Composer.__init__(self)
            self.start_counting()

else:
    _Loader = _SlowLoader  # type: ignore[misc, assignment]


def _construct_int(loader: Any, node: Any) -> int:
    """Return an integer in any notation of YAML's, with a bounded number of digits."""
    long = isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_DIGITS
    return bounded_int(node.value) if long else loader.construct_yaml_int(node)


def _construct_float(loader: Any, node: Any) -> float:
    """Return a number; infinity for one in sexagesimal notation that no float can hold."""
    try:
        return float(loader.construct_yaml_float(node))
    except OverflowError:
        return math.inf


for _class in (_Loader, _SlowLoader):
    _class.add_constructor("tag:yaml.org,2002:int", _construct_int)
    _class.add_constructor("tag:yaml.org,2002:float", _construct_float)


def begins_as_prompts(file: TextIO, max_items: int) -> bool:
    """Return True for a list in which a mapping comes before any error of syntax, or no error comes at all.

    Looks at the first ``max_items`` items. Raises yaml.YAMLError for an error before that.
    """
    loader = _Loader(file)
    try:
        depth = items = 0
        while not loader.check_event(yaml.StreamEndEvent) and items < max_items:
            event = loader.get_event()
            if isinstance(event, yaml.MappingStartEvent | yaml.AliasEvent):
                return True
            if isinstance(event, yaml.SequenceStartEvent):
                depth += 1
            elif isinstance(event, yaml.SequenceEndEvent):
                depth -= 1
            elif isinstance(event, yaml.ScalarEvent):
                if not depth:
                    return False  # a text: prose behind a line of dashes
                items += 1
        return True
    finally:
        loader.dispose()


def entries(file: TextIO) -> Iterator[tuple[int, object]]:
    """Yield the entries of a list, or of the list under ``prompts``, with their lines.

    Raises ValueError and yaml.YAMLError.
    """
    try:
        yield from _entries(_Loader(file))
    except (ParserError, ScannerError):
        file.seek(0)
        for _ in _entries(_SlowLoader(file)):  # slower, but reports the exact line
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
    keys: set[str] = set()
    while not loader.check_event(yaml.MappingEndEvent):
        key = loader.compose_node(None, None)
        name = key.value if isinstance(key, yaml.ScalarNode) else None
        if name in keys:
            raise ComposerError(None, None, repeated_keys([name])[0], key.start_mark)
        if name is not None:
            keys.add(name)
        if name == "prompts":
            yield from _list_entries(loader)
        else:
            loader.compose_node(None, None)  # for its anchors
            _refuse_repeated_keys(loader)
    loader.get_event()
    if "prompts" not in keys:
        raise ValueError(NOT_A_LIST)


def _refuse_repeated_keys(loader: Any) -> None:
    for mark, key in loader.repeated:
        raise ComposerError(None, None, repeated_keys([key])[0], mark)


def _list_entries(loader: Any) -> Iterator[tuple[int, object]]:
    start = loader.peek_event()
    is_list = isinstance(start, yaml.SequenceStartEvent) and start.tag in {None, "!", _SEQUENCE}
    if not is_list or start.anchor is not None:
        yield from _anchored_entries(loader)
        return
    loader.get_event()
    while not loader.check_event(yaml.SequenceEndEvent):
        line, before = loader.peek_event().start_mark.line + 1, loader.expanded
        node = loader.compose_node(None, None)
        if loader.expanded - before > _MAX_ENTRY_VALUES:
            yield line, Unreadable([f"contains more than {_MAX_ENTRY_VALUES:,} values"])
        elif loader.repeated:
            lines = [mark.line + 1 for mark, _ in loader.repeated]
            errors = repeated_keys(key for _, key in loader.repeated)
            yield line, Unreadable([f"{error} (line {at})" for error, at in zip(errors, lines, strict=False)])
        elif errors := _misread(node):
            yield line, Unreadable(errors)
        else:
            yield line, _constructed(loader, node)
        loader.repeated.clear()
    loader.get_event()


def _misread(node: Any) -> list[str]:
    """Return an error for each field that YAML reads as another value than what is written: 010 as 8.

    An ``aspect_ratio`` such as 16:9 is read as it is written.
    """
    errors = []
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if value.tag in _KINDS and _is_plain(key, value):
            if key.value == "aspect_ratio" and value.tag == _INT:
                value.tag = _STR
            elif remedy := _remedy(key.value, value):
                shown = quoted(value.value).strip("'")
                errors.append(f"{key.value}: YAML reads {shown} as {_KINDS[value.tag]}; {remedy}")
        elif key.tag == _MERGE:
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            errors += [error for each in merged for error in _misread(each)]
    return errors


def _is_plain(key: Any, value: Any) -> bool:
    """Return True if the value is a scalar without quotes."""
    return isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode) and not value.style


def _remedy(name: str, value: Any) -> str | None:
    """Return what to do about a plain value that is no text for YAML; None if it is read as it is written."""
    if name in _IDS:
        what = "the id" if name in {"id", "_id"} else "it"
        return None if value.tag == _INT and _DECIMAL.fullmatch(value.value) else f"put {what} in quotes"
    if name in _TEXTS:
        return "put it in quotes"
    if value.tag == _INT and _OCTAL_OR_TIME.fullmatch(value.value):
        return "write a decimal number"
    return None


def _constructed(loader: Any, node: Any) -> object:
    """Return the value of a node, or Unreadable. Raises ConstructorError, which has the exact line.

    Values behind aliases are constructed once and shared by the entries, which are not modified.
    """
    built: dict[Any, object] = {}
    loader.constructed_objects = ChainMap(built, loader.shared)
    aliased, loader.aliased = loader.aliased, set()
    try:
        value = loader.construct_document(node)
    except yaml.MarkedYAMLError:
        raise
    except Exception as exc:  # noqa: BLE001 - such as a date that does not exist; the next entry is read
        loader.recursive_objects, loader.state_generators, loader.deep_construct = {}, [], False
        reason = f": {one_line(exc)}" if isinstance(exc, ValueError) else ""
        return Unreadable([f"contains a value that cannot be read{reason}"])
    for alias in aliased:
        # A merge constructs the values of a mapping, but not the mapping.
        merged = [member for _, member in alias.value] if isinstance(alias, yaml.MappingNode) else []
        loader.shared.update((each, built[each]) for each in (alias, *merged) if each in built)
    return value


def _anchored_entries(loader: Any) -> Iterator[tuple[int, object]]:
    """Yield the entries of a list that has an anchor or is an alias; it is in memory as a whole."""
    node = loader.compose_node(None, None)
    _refuse_repeated_keys(loader)
    members = node.value if isinstance(node, yaml.SequenceNode) else []
    misread = [_misread(child) for child in members]
    entries = _constructed(loader, node)
    if isinstance(entries, Unreadable):
        raise ComposerError(None, None, entries.errors[0], node.start_mark)
    if not isinstance(node, yaml.SequenceNode) or not isinstance(entries, list):
        raise ValueError(NOT_A_LIST)  # noqa: TRY004 - an invalid value in a file, not a wrong type
    for child, errors, entry in zip(node.value, misread, entries, strict=True):
        yield child.start_mark.line + 1, Unreadable(errors) if errors else entry
