"""Log lines, for people or for machines, in a stream and in a file; none of them shows a secret.

Knows nothing of what happens; ``progress`` shows that.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from text2img.errors import ConfigurationError, Stopped, Text2ImgError
from text2img.telemetry.progress import Bar, NullProgress, Progress

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import Console

    from text2img.settings import Settings

_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


_STANDS_IN_URLS = "!#$%&'()*+,/:;=?@[]~"


class Mask:
    """Replaces secrets, and the passwords inside URLs, wherever they turn up in a text."""

    def __init__(self, secrets: Iterable[str]) -> None:
        words: set[str] = set()
        for secret in secrets:
            words |= _parts(secret) if "://" in secret else {secret, secret.removeprefix("whsec_")}
        words |= {json.dumps(word)[1:-1] for word in words}  # as they stand in a line of JSON
        # The longest first: a part that is masked too early would leave the rest of the whole standing.
        self._words = sorted((word for word in words if len(word) > 2), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """The text with ``***`` in place of every secret."""
        for word in self._words:
            text = text.replace(word, "***")
        return text


def _parts(url: str) -> set[str]:
    """What must not be shown of a URL, also where it is taken apart: itself, its password, its query."""
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite":
        return set()
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    password = authority.rpartition("@")[0].partition(":")[2]
    # A webhook's path may be its password; a database's is its name, which may be shown.
    own = path if scheme in {"http", "https"} and len(path) > 8 else ""
    # HTTP libraries escape what a URL should not hold, and speak of it in that form.
    sent = {quote(part, safe=_STANDS_IN_URLS) for part in (url, query, own)}
    return {url, query, own, *sent, password, unquote(password), quote(unquote(password), safe="")}


class _Masked(logging.Formatter):
    """A formatter whose output passes the mask; ``traces`` keeps stack traces in."""

    def __init__(self, mask: Mask, *, traces: bool) -> None:
        super().__init__()
        self._mask = mask
        self._traces = traces

    def format(self, record: logging.LogRecord) -> str:
        facts = {name: value for name, value in vars(record).items() if name not in _RECORD_FIELDS}
        trace = ""
        if record.exc_info and self._traces:
            trace = "".join(traceback.format_exception(*record.exc_info))
        return self._mask(self.write(record, facts, trace))

    def write(self, record: logging.LogRecord, facts: dict[str, object], trace: str) -> str:
        """The record as text."""
        raise NotImplementedError


class JsonLines(_Masked):
    """One JSON object a line, with ``severity`` as Google Cloud's log agents read it."""

    def write(self, record: logging.LogRecord, facts: dict[str, object], trace: str) -> str:
        """``time``, ``severity`` and ``message``, then what the event carries."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": moment, "severity": record.levelname, "message": record.getMessage(), **facts}
        if trace:
            line["stack_trace"] = trace
        return json.dumps(line, default=str)


class TextLines(_Masked):
    """A line for people."""

    def write(self, record: logging.LogRecord, facts: dict[str, object], trace: str) -> str:
        """Time, level where it matters, and the message."""
        del facts
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        line = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {level}{record.getMessage()}"
        return f"{line}\n{trace}" if trace else line


class _Console(logging.Handler):
    """Writes above the bar instead of through it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def set_up(settings: Settings, mask: Mask) -> Progress:
    """Route all logging as the settings ask, and give the progress that goes with it.

    Raises ConfigurationError for a log file that cannot be written.
    """
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.WARNING)  # other people's libraries speak up only when something is wrong
    logging.getLogger("text2img").setLevel(settings.log_level)
    logging.captureWarnings(capture=True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    debug = settings.log_level == "DEBUG"
    people = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    progress: Progress = NullProgress()
    handler: logging.Handler = logging.StreamHandler()
    if people and sys.stderr.isatty():
        from rich.console import Console

        console = Console(stderr=True)
        progress, handler = Bar(console), _Console(console)
        handler.setLevel(logging.DEBUG if debug else logging.WARNING)  # the bar says the rest
    handler.setFormatter((TextLines if people else JsonLines)(mask, traces=debug))
    root.addHandler(handler)
    if settings.log_file:
        root.addHandler(_file(settings.log_file, mask))
    return progress


def report_failure(exc: Exception) -> int:
    """Say in one line what ended the command (a stack trace where the settings want it); its exit status."""
    log = logging.getLogger("text2img")
    if isinstance(exc, Stopped):
        log.warning("%s; what was claimed is released", exc)
    elif isinstance(exc, Text2ImgError):
        log.error("%s", exc, exc_info=exc)
    else:
        first = (str(exc).splitlines() or [""])[0]
        log.error("unexpected %s: %s; --log-level DEBUG shows where", type(exc).__name__, first, exc_info=exc)
    return getattr(exc, "exit_status", 1)


class _File(logging.FileHandler):
    """A log file that is given up, with a word to the other handlers, once it takes no more."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """As Handler.handleError, without its traces: a full disk must cost the run no more than its log."""
        del record
        reason = sys.exc_info()[1]
        logging.getLogger().removeHandler(self)
        why = reason.strerror if isinstance(reason, OSError) else reason
        logging.getLogger("text2img").warning(
            "--log-file %s cannot be written any more: %s", self.baseFilename, why
        )


def _file(path: str, mask: Mask) -> logging.Handler:
    try:
        handler = _File(path, encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"--log-file {path} cannot be written: {exc.strerror}") from exc
    handler.setFormatter(JsonLines(mask, traces=True))
    return handler
