"""Log lines for people or for machines, on standard error and in a file; secrets are masked in all of them.

``progress`` shows the state of the run.
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
from text2img.settings import expand_home
from text2img.telemetry.progress import Bar, NullProgress, Progress
from text2img.telemetry.terminal import can_redraw, escape

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

    from text2img.settings import Settings

_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


_MAX_MESSAGE = 8_000
"""Characters of a message, and of a line of one that has several: an id alone may have millions."""
_MAX_FACT = 2_000
"""Characters of a field's text."""
_MAX_TRACE = 100_000
"""Characters of a stack trace, or of the stacks of all threads."""


_URL_SAFE = "!#$%&'()*+,/:;=?@[]~"


class Mask:
    """Replaces secrets, and the passwords inside URLs, wherever they occur in a text."""

    def __init__(self, secrets: Iterable[str]) -> None:
        words: set[str] = set()
        for secret in secrets:
            words |= _secret_parts(secret) if "://" in secret else {secret, secret.removeprefix("whsec_")}
        words |= {json.dumps(word)[1:-1] for word in words}  # as JSON escapes them
        words |= {escape(word) for word in words}
        # The longest first: masking a part first would leave the rest of the whole secret in the text.
        self._words = sorted((word for word in words if len(word) > 2), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """Return the text with ``***`` in place of every secret."""
        for word in self._words:
            text = text.replace(word, "***")
        return text


def _secret_parts(url: str) -> set[str]:
    """Return what must not be shown of a URL: the URL, its password and its query, plain and encoded."""
    scheme, _, rest = url.partition("://")
    if scheme == "sqlite":
        return set()
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    password = authority.rpartition("@")[0].partition(":")[2]
    # A webhook's path may be its password; a database's is its name, which may be shown.
    secret_path = path if scheme in {"http", "https"} and len(path) > 8 else ""
    # HTTP libraries escape invalid characters of a URL, and log it in that form.
    sent = {quote(part, safe=_URL_SAFE) for part in (url, query, secret_path)}
    return {url, query, secret_path, *sent, password, unquote(password), quote(unquote(password), safe="")}


class _Masked(logging.Formatter):
    """A formatter that masks its output; ``traces`` includes stack traces."""

    def __init__(self, mask: Mask, *, traces: bool) -> None:
        super().__init__()
        self._mask = mask
        self._traces = traces

    def format(self, record: logging.LogRecord) -> str:
        facts = {
            name: self._shortened(value, _MAX_TRACE if name == "stack_trace" else _MAX_FACT)
            for name, value in vars(record).items()
            if name not in _RECORD_FIELDS
        }
        trace = ""
        if record.exc_info and self._traces:
            trace = self.shortened("".join(traceback.format_exception(*record.exc_info)), _MAX_TRACE)
        return self._mask(self.write(record, facts, trace))

    def write(self, record: logging.LogRecord, facts: dict[str, object], trace: str) -> str:
        """Return the record as text; ``facts`` are the fields that the event carries."""
        raise NotImplementedError

    def shortened(self, text: str, max_chars: int = _MAX_MESSAGE) -> str:
        """Return the text, cut if it is longer; masked before, so that no secret is cut in two."""
        if len(text) <= max_chars:
            return text
        return f"{self._mask(text)[:max_chars]}… ({len(text):,} characters)"

    def _shortened(self, value: object, max_chars: int) -> object:
        return self.shortened(value, max_chars) if isinstance(value, str) else value


class JsonLines(_Masked):
    """A formatter of one JSON object a line, with ``severity`` as Google Cloud's log agents read it."""

    def write(self, record: logging.LogRecord, facts: dict[str, object], trace: str) -> str:
        """Return ``time``, ``severity`` and ``message``, then the event's own fields, as JSON."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        message = "\n".join(map(self.shortened, _message_lines(record)))
        line = {"time": moment, "severity": record.levelname, "message": message, **facts}
        if trace:
            line["stack_trace"] = trace
        return json.dumps(line, default=str)


class TextLines(_Masked):
    """A formatter of lines for people."""

    def write(self, record: logging.LogRecord, facts: dict[str, object], trace: str) -> str:
        """Return the time, the level unless it is INFO, and the message; then the stack trace, if any."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        start = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {level}"
        trace = trace or str(facts.get("stack_trace", ""))
        # The trace is indented: a message inside it could otherwise forge a line of the log.
        message = map(self.shortened, _message_lines(record))
        lines = [*message, *(f"    {line}" for line in trace.splitlines())]
        return start + "\n".join(map(escape, lines))


def _message_lines(record: logging.LogRecord) -> Sequence[str]:
    """Return the message's lines: several only for an error of our own that has several."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, Text2ImgError) and record.msg == "%s" and record.args == (error,):
        return error.lines
    return [record.getMessage()]


class _Console(logging.Handler):
    """A handler that prints above the progress bar instead of through it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, emoji=False, highlight=False, soft_wrap=True)


def set_up(settings: Settings, mask: Mask) -> Progress:
    """Configure all logging from the settings, and return the progress display that goes with it.

    Raises ConfigurationError for a log file that cannot be written.
    """
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.WARNING)  # third-party libraries log only what is wrong
    logging.getLogger("text2img").setLevel(settings.log_level)
    logging.captureWarnings(capture=True)
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    # Its warnings show the whole URL, of which a webhook's path may be a password.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    debug = settings.log_level == "DEBUG"
    text = settings.log_format == "text" or (settings.log_format == "auto" and sys.stderr.isatty())
    progress: Progress = NullProgress()
    handler: logging.Handler = logging.StreamHandler()
    if text and can_redraw(sys.stderr):
        from rich.console import Console

        console = Console(stderr=True)
        progress, handler = Bar(console), _Console(console)
        handler.setLevel(logging.DEBUG if debug else logging.WARNING)  # the bar shows the rest
    handler.setFormatter((TextLines if text else JsonLines)(mask, traces=debug))
    root.addHandler(handler)
    if settings.log_file:
        root.addHandler(_file_handler(settings.log_file, mask))
    return progress


def report_failure(exc: Exception) -> int:
    """Log in one line what ended the command, and return the exit status.

    The log's settings decide whether a stack trace follows.
    """
    log = logging.getLogger("text2img")
    if isinstance(exc, Stopped):
        log.warning("%s", failure_message(exc))
    elif isinstance(exc, Text2ImgError):
        log.error("%s", exc, exc_info=exc)
    else:
        log.error("%s; use --log-level DEBUG for a stack trace", failure_message(exc), exc_info=exc)
    return getattr(exc, "exit_status", 1)


def failure_message(exc: Exception) -> str:
    """Return what ended the command, without an advice that is for people only."""
    if isinstance(exc, Stopped):
        return f"{exc}; claimed prompts are released"
    if isinstance(exc, Text2ImgError):
        return str(exc)
    return f"unexpected {type(exc).__name__}: {(str(exc).splitlines() or [''])[0]}"


class _LogFile(logging.FileHandler):
    """A log file; the first write error removes this handler and is reported to the others."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Remove the handler instead of printing a trace: a full disk must not end the run."""
        del record
        error = sys.exc_info()[1]
        logging.getLogger().removeHandler(self)
        reason = error.strerror if isinstance(error, OSError) else error
        logging.getLogger("text2img").warning(
            "--log-file %s cannot be written any more and is not used from here on: %s",
            self.baseFilename,
            reason,
        )


def _file_handler(path: str, mask: Mask) -> logging.Handler:
    file = expand_home(path, "--log-file (LOG_FILE)")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(file, encoding="utf-8")
    except OSError as exc:
        raise ConfigurationError(f"--log-file {path} cannot be written: {exc.strerror}") from exc
    handler.setFormatter(JsonLines(mask, traces=True))
    return handler
