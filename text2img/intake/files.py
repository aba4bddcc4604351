"""Files of prompts, read twice: once to check all of it, and again to return the checked prompts.

Between the two only fingerprints of the prompts are kept in memory.
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
from text2img.intake.entries import int_if_whole, new_prompt
from text2img.intake.formats import entries, format_of, guess_format

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

    from text2img.databases import NewPrompt

_MAX_ERRORS_SHOWN: Final = 50
_CHUNK_BYTES: Final = 2**16
_FINGERPRINT_BYTES: Final = 14
"""The size of a fingerprint: two of a million prompts collide in one of 10²² files."""


def read_prompts(path: str) -> Prompts:
    """Return the checked prompts of a file; ``-`` is standard input, whose format is detected.

    Raises ConfigurationError with a line for each error, which names the file, the line and the field.
    """
    kind = None if path == "-" else format_of(path)
    source = _Source.of(path)
    if kind is None:
        with source.text() as text:
            kind = guess_format(text)
    return Prompts(source, kind)


class Prompts:
    """The prompts of a file, without duplicates; every iteration reads the file again.

    Memory holds only two fingerprints of each prompt, of its id and of its content: 100 to 200 bytes. They
    detect an id that is used twice, and a file that has changed since the check. Iterating a changed file
    raises ConfigurationError instead of yielding an unchecked prompt.
    """

    def __init__(self, source: _Source, kind: str) -> None:
        self._source, self._kind = source, kind
        self._known: dict[bytes, bytes] = {}
        self._check()

    def __len__(self) -> int:
        return len(self._known)

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

    def _check(self) -> None:
        error_count, shown = 0, list[str]()
        for line, prompt, errors in self._read():
            if prompt is not None:
                prompt_id, content = _fingerprint(prompt)
                if self._known.setdefault(prompt_id, content) != content:
                    errors.append(f"id {prompt.id} is used above already, with other content")
            error_count += len(errors)
            if len(shown) < _MAX_ERRORS_SHOWN:
                shown += [f"{self._source.name}, line {line}: {error}" for error in errors]
        if error_count:
            hidden = error_count - _MAX_ERRORS_SHOWN
            more = [f"… and {hidden} more"] if hidden > 0 else []
            raise ConfigurationError(*shown[:_MAX_ERRORS_SHOWN], *more)

    def _read(self) -> Iterator[tuple[int, NewPrompt | None, list[str]]]:
        with self._source.text() as text:
            for line, entry in entries(self._kind, text, self._source.name):
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

        Raises ConfigurationError if it cannot be read, or is not UTF-8.
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
            text = io.TextIOWrapper(file, encoding="utf-8-sig")
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
        decoder, bytes_read = codecs.getincrementaldecoder("utf-8")(), 0
        with self.data() as file:
            try:
                while chunk := file.read(_CHUNK_BYTES):
                    bytes_read += len(chunk)
                    decoder.decode(chunk)
                decoder.decode(b"", final=True)
            except UnicodeDecodeError as exc:
                position = bytes_read - len(exc.object) + exc.start
                raise ConfigurationError(f"{self.name} is not UTF-8 text (byte {position})") from exc


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
    return _digest([prompt.id.kind, prompt.id.text]), _digest(_normalized(content_of(prompt)))


def _digest(value: object) -> bytes:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=_FINGERPRINT_BYTES).digest()


def _normalized(value: object) -> object:
    if isinstance(value, dict):
        return {name: _normalized(item) for name, item in value.items()}
    return [_normalized(item) for item in value] if isinstance(value, list) else int_if_whole(value)
