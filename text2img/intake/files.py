"""Files of prompts, read twice: once to check all of it, and again to return the checked prompts.

Between the two only fingerprints of the prompts are kept in memory.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import re
import sys
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from text2img.databases.documents import content_of
from text2img.errors import ConfigurationError, PromptFailed
from text2img.intake.entries import int_if_whole, new_prompt
from text2img.intake.formats import entries, format_of, is_csv_header
from text2img.prompts import PromptId
from text2img.prompts.quoting import plain_text
from text2img.prompts.syntax import PromptSyntax

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from text2img.databases import NewPrompt

_MAX_ERRORS_SHOWN: Final = 50
_CHUNK_BYTES: Final = 2**16
_FINGERPRINT_BYTES: Final = 14
"""The size of a fingerprint: two of a million prompts collide in one of 10²² files."""


def read_prompts(path: str, *, file_format: str | None = None, syntax: PromptSyntax | None = None) -> Prompts:
    """Return the checked prompts of a file; ``-`` is standard input.

    The ``file_format`` is one of FORMATS; by default it follows from a file's name,
    and from standard input's content. ``syntax`` checks the texts. Raises ConfigurationError with
    a line for each error, which names the file, the line and the field.
    """
    if file_format or path != "-":
        kind = f".{file_format}" if file_format else format_of(path)
        return Prompts(_Source.of(path), kind, syntax=syntax)
    source = _Source.of(path)
    with source.text() as text:
        kind = guess_format(text)
    return Prompts(source, kind, name=f"{source.name} (read as {kind[1:]}; --format decides)", syntax=syntax)


FORMATS: Final = ("json", "jsonl", "yaml", "csv", "txt")
_YAML_START: Final = re.compile(r"\s*(?:-(?:\s|$)|---(?:\s|$)|%YAML\s)")
_YAML_KEY: Final = re.compile(r"\s*(?:[\"'][^\"']*[\"']|[^\s:#][^:]*+)\s*:(?:\s|$)")
_YAML_PROMPTS: Final = re.compile(r"\s*([\"']?)prompts\1\s*:(?:\s|$)")
_MAX_LINE_CHARS: Final = 2**16
_MAX_ITEMS_SEEN: Final = 1_000


def guess_format(file: TextIO) -> str:
    """Return the format that follows from a text's content.

    ``[`` begins JSON, ``{`` JSON or JSON lines. A list, or a mapping with ``prompts``, is YAML. A first row
    that names the prompt's text is CSV. All else is a text of one prompt a line.
    """
    first = second = ""
    while not second and (line := file.readline(_MAX_LINE_CHARS)):
        if line.strip():
            first, second = (first, line) if first else (line, second)
    words = first.strip()
    if words.startswith("["):
        return ".json"
    if words.startswith("{"):
        return ".jsonl" if _is_json_line(words) else ".json"
    if _SEPARATOR_START.match(words) or is_csv_header(first):
        return ".csv"
    file.seek(0)
    return ".yaml" if _is_yaml(file) else ".txt"


_SEPARATOR_START: Final = re.compile(r'"?sep=\S', re.IGNORECASE)


def _is_json_line(words: str) -> bool:
    """Return True if the line is an object of its own, and none that holds a list of prompts."""
    try:
        entry = json.loads(words)
    except json.JSONDecodeError as exc:
        return exc.pos < len(words)  # a broken line, whose error has its number; else it goes on below
    except (ValueError, RecursionError):
        return True
    return isinstance(entry, dict) and not isinstance(entry.get("prompts"), list)


def _is_yaml(file: TextIO) -> bool:
    """Return True for a list of mappings or texts, and for a mapping with ``prompts``; not for prose."""
    content = (line for line in file if line.strip() and not line.lstrip().startswith("#"))
    first = next(content, "")
    if _YAML_START.match(first):
        file.seek(0)
        return _begins_as_yaml_list(file)
    return bool(_YAML_KEY.match(first)) and any(map(_YAML_PROMPTS.match, chain([first], content)))


def _begins_as_yaml_list(file: TextIO) -> bool:
    """Return True if a mapping comes before any error of syntax, or no error does."""
    import yaml

    from text2img.intake import yaml_stream

    try:
        return yaml_stream.begins_as_prompts(file, _MAX_ITEMS_SEEN)
    except yaml.YAMLError:
        return False


class Prompts:
    """The prompts of a file, without duplicates; every iteration reads the file again.

    Memory holds only two fingerprints of each prompt, of its id and of its content: 100 to 200 bytes. They
    detect an id that is used twice, and a file that has changed since the check. Iterating a changed file
    raises ConfigurationError instead of yielding an unchecked prompt.
    """

    def __init__(
        self, source: _Source, kind: str, *, name: str | None = None, syntax: PromptSyntax | None = None
    ) -> None:
        self._source, self._kind, self._name = source, kind, name or source.name
        self._known: dict[bytes, bytes] = {}
        self._check(syntax or PromptSyntax())

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, prompt_id: object) -> bool:
        return isinstance(prompt_id, PromptId) and _id_fingerprint(prompt_id) in self._known

    @property
    def path(self) -> str | None:
        """The file's absolute path; None for standard input and other streams."""
        if self._source.spooled:
            return None
        # Links stay: Kubernetes mounts a file as a link, whose target has another name after each change.
        return plain_text(os.path.abspath(self._source.name))  # noqa: PTH100

    def __iter__(self) -> Iterator[NewPrompt]:
        # In the order of the check; a prompt that is known but not expected next is a duplicate.
        remaining = iter(self._known.items())
        expected = next(remaining, None)
        for _, prompt, _ in self._read():
            fingerprint = None if prompt is None else _fingerprint(prompt)
            if prompt is not None and fingerprint == expected:
                expected = next(remaining, None)
                yield prompt
            elif fingerprint is None or self._known.get(fingerprint[0]) != fingerprint[1]:
                raise self._changed_error()
        if expected is not None:
            raise self._changed_error()

    def _check(self, syntax: PromptSyntax) -> None:
        error_count, shown = 0, list[str]()
        for line, prompt, errors in self._read():
            if prompt is not None:
                try:
                    syntax.check(prompt.id, prompt.text, prompt.requested.negative_prompt)
                except PromptFailed as exc:
                    errors.append(str(exc))
                prompt_id, content = _fingerprint(prompt)
                if self._known.setdefault(prompt_id, content) != content:
                    errors.append(f"id {prompt.id} is used above already, with other content")
            error_count += len(errors)
            if len(shown) < _MAX_ERRORS_SHOWN:
                shown += [f"{self._name}, line {line}: {error}" for error in errors]
        if error_count:
            hidden = error_count - _MAX_ERRORS_SHOWN
            more = [f"… and {hidden} more"] if hidden > 0 else []
            raise ConfigurationError(*shown[:_MAX_ERRORS_SHOWN], *more)
        if not self._known:
            raise ConfigurationError(f"{self._name} holds no prompts")

    def _read(self) -> Iterator[tuple[int, NewPrompt | None, list[str]]]:
        with self._source.text() as text:
            for line, entry in entries(self._kind, text, self._name):
                yield line, *new_prompt(entry)

    def _changed_error(self) -> ConfigurationError:
        return ConfigurationError(
            f"{self._source.name} changed after it was checked; no unchecked prompt was added; run it again"
        )


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Source:
    """A source that can be read repeatedly: a file, or a temporary copy of a stream."""

    name: str
    spooled: IO[bytes] | None = None

    def __post_init__(self) -> None:
        if self.spooled is not None:
            weakref.finalize(self, self.spooled.close)

    @classmethod
    def of(cls, path: str) -> _Source:
        """Return the source of a file, or of a stream, which is copied to a temporary file.

        Raises ConfigurationError if it cannot be read, or is neither UTF-8 nor marked as UTF-16.
        """
        if path == "-":
            source = cls("standard input", _spool(sys.stdin.buffer))
        elif Path(path).exists() and not Path(path).is_file():
            with cls(path).data() as stream:
                source = cls(path, _spool(stream))
        else:
            source = cls(path)
        source._check_encoding()
        return source

    @contextmanager
    def text(self) -> Iterator[TextIO]:
        """Open its text at the start, for the ``with`` block."""
        with self.data() as file:
            text = io.TextIOWrapper(file, encoding=_encoding_of(file))
            try:
                yield text
            finally:
                text.detach()

    @contextmanager
    def data(self) -> Iterator[IO[bytes]]:
        """Open its bytes at the start, for the ``with`` block."""
        try:
            if self.spooled is None:
                with Path(self.name).open("rb") as file:
                    yield file
            else:
                self.spooled.seek(0)
                yield self.spooled
        except OSError as exc:
            raise ConfigurationError(f"{self.name} cannot be read: {exc.strerror}") from exc

    def _check_encoding(self) -> None:
        with self.data() as file:
            encoding, bytes_read = _encoding_of(file), 0
            decoder = codecs.getincrementaldecoder(encoding)()
            name = encoding.removesuffix("-sig").upper()
            try:
                while chunk := file.read(_CHUNK_BYTES):
                    if not bytes_read and b"\0" in chunk[:2] and name == "UTF-8":
                        raise ConfigurationError(f"{self.name} is not UTF-8 text (NUL bytes); {_SAVE_AS}")
                    bytes_read += len(chunk)
                    decoder.decode(chunk)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError as exc:
                position = bytes_read - len(exc.object) + exc.start
                raise ConfigurationError(
                    f"{self.name} is not {name} text (byte {position}); {_SAVE_AS}"
                ) from exc


_SAVE_AS: Final = "save it as UTF-8 (spreadsheets: CSV UTF-8)"


def _encoding_of(file: IO[bytes]) -> str:
    """Return the encoding that the byte order mark indicates, else UTF-8; the file is at its start."""
    start = file.read(2)
    file.seek(0)
    return "utf-16" if start in {codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE} else "utf-8-sig"


def _spool(stream: IO[bytes]) -> IO[bytes]:
    """Copy a stream to an unnamed temporary file."""
    import shutil
    import tempfile

    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - it stays open as long as the prompts are in use
        shutil.copyfileobj(stream, file)
    except OSError as exc:
        raise ConfigurationError(f"cannot copy standard input to {tempfile.gettempdir()}: {exc}") from exc
    return file


def _fingerprint(prompt: NewPrompt) -> tuple[bytes, bytes]:
    """Return fingerprints of the id and of the content; equal content, as 7 and 7.0, has the same one."""
    return _id_fingerprint(prompt.id), _digest(_normalized(content_of(prompt)))


def _id_fingerprint(prompt_id: PromptId) -> bytes:
    return _digest([prompt_id.kind, prompt_id.text])


def _digest(value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=_FINGERPRINT_BYTES).digest()


def _normalized(value: object) -> object:
    if isinstance(value, dict):
        return {name: _normalized(item) for name, item in value.items()}
    return [_normalized(item) for item in value] if isinstance(value, list) else int_if_whole(value)
