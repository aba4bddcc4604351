"""A file of prompts, read twice: once to check all of it, and again to hand out what was checked.

Of what was read before only fingerprints are in memory. Knows no database and no format.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import sys
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from text2img.databases.documents import content_of
from text2img.errors import ConfigurationError
from text2img.intake.entries import new_prompt, whole
from text2img.intake.formats import entries, format_of, guess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from text2img.databases import NewPrompt

_SHOWN: Final = 50
_CHUNK: Final = 2**16
_MARK: Final = 14
"""Bytes of a fingerprint: two of a million prompts agree by chance once in 10²² files."""


def read_prompts(path: str) -> Prompts:
    """The prompts of a file (``-``: standard input, its format found by looking at it), all of them checked.

    Raises ConfigurationError with a line for each thing that is wrong: the file, the line and the field.
    """
    kind = None if path == "-" else format_of(path)
    source = _Source.of(path)
    if kind is None:
        with source.text() as text:
            kind = guess(text)
    return Prompts(source, kind)


class Prompts:
    """The prompts of a file: each once, and as often as they are asked for, read from the file every time.

    What is in memory does not grow with the file but for two fingerprints of each prompt, of its id and of
    its content: 100 to 200 bytes. They find an id that is used twice, and a file that has changed since it
    was checked: who iterates then gets a ConfigurationError in place of the first prompt that was not.
    """

    def __init__(self, source: _Source, kind: str) -> None:
        self._source, self._kind = source, kind
        self._marks: dict[bytes, bytes] = {}
        self._check()

    def __len__(self) -> int:
        return len(self._marks)

    def __iter__(self) -> Iterator[NewPrompt]:
        # In the order in which they were checked: whatever else was checked stands above already.
        waiting = iter(self._marks.items())
        due = next(waiting, None)
        for _, prompt, _ in self._read():
            mark = None if prompt is None else _mark(prompt)
            if prompt is not None and mark == due:
                due = next(waiting, None)
                yield prompt
            elif mark is None or self._marks.get(mark[0]) != mark[1]:
                raise self._changed()
        if due is not None:
            raise self._changed()

    def _check(self) -> None:
        invalid_value, shown = 0, list[str]()
        for line, prompt, complaints in self._read():
            if prompt is not None:
                ident, content = _mark(prompt)
                if self._marks.setdefault(ident, content) != content:
                    complaints.append(f"id {prompt.id} stands above already, with other content")
            invalid_value += len(complaints)
            if len(shown) < _SHOWN:
                shown += [f"{self._source.name}, line {line}: {complaint}" for complaint in complaints]
        if invalid_value:
            more = f"\n… and {invalid_value - _SHOWN} more" if invalid_value > _SHOWN else ""
            raise ConfigurationError("\n".join(shown[:_SHOWN]) + more)

    def _read(self) -> Iterator[tuple[int, NewPrompt | None, list[str]]]:
        with self._source.text() as text:
            for line, entry in entries(self._kind, text, self._source.name):
                yield line, *new_prompt(entry)

    def _changed(self) -> ConfigurationError:
        return ConfigurationError(
            f"{self._source.name} was changed after it had been checked; nothing unchecked was added: run it"
            " again"
        )


@dataclass(frozen=True, slots=True, weakref_slot=True)
class _Source:
    """What can be read again from its start: a file, or what was kept of a stream."""

    name: str
    kept: IO[bytes] | None = None

    def __post_init__(self) -> None:
        if self.kept is not None:
            weakref.finalize(self, self.kept.close)

    @classmethod
    def of(cls, path: str) -> _Source:
        """The file, or all of the stream, which goes into a temporary file.

        Raises ConfigurationError for one that cannot be read, or is no UTF-8.
        """
        if path == "-":
            source = cls("standard input", _kept(sys.stdin.buffer))
        elif Path(path).exists() and not Path(path).is_file():
            with cls(path).data() as stream:
                source = cls(path, _kept(stream))
        else:
            source = cls(path)
        source._check_encoding()
        return source

    @contextmanager
    def text(self) -> Iterator[TextIO]:
        """Its text from the start, for the block."""
        with self.data() as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig")
            try:
                yield text
            finally:
                text.detach()

    @contextmanager
    def data(self) -> Iterator[IO[bytes]]:
        """Its bytes from the start, for the block."""
        try:
            if self.kept is None:
                with Path(self.name).open("rb") as file:
                    yield file
            else:
                self.kept.seek(0)
                yield self.kept
        except OSError as exc:
            raise ConfigurationError(f"{self.name} cannot be read: {exc.strerror}") from exc

    def _check_encoding(self) -> None:
        decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
        with self.data() as file:
            try:
                while chunk := file.read(_CHUNK):
                    read += len(chunk)
                    decoder.decode(chunk)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError as exc:
                place = read - len(exc.object) + exc.start
                raise ConfigurationError(f"{self.name} is no UTF-8 text (byte {place})") from exc


def _kept(stream: IO[bytes]) -> IO[bytes]:
    """A temporary file without a name, with all that the stream gives."""
    import shutil
    import tempfile

    try:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - it is read for as long as the prompts are asked for
        shutil.copyfileobj(stream, file)
    except OSError as exc:
        raise ConfigurationError(f"standard input cannot be kept in {tempfile.gettempdir()}: {exc}") from exc
    return file


def _mark(prompt: NewPrompt) -> tuple[bytes, bytes]:
    """Fingerprints of the id, and of the content: equal where that is equal, as 7 and 7.0 are."""
    return _digest([prompt.id.kind, prompt.id.text]), _digest(_plain(content_of(prompt)))


def _digest(value: object) -> bytes:
    written = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(written.encode(), digest_size=_MARK).digest()


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else whole(value)
