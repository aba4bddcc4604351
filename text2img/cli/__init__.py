"""The command line: commands and flags → Settings → a command → the exit status.

This module holds only the parser, so that ``--help`` and a wrong flag are answered before anything heavy is
imported. Each command is a module of its own, imported on demand.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from text2img import __version__
from text2img.errors import ConfigurationError, Text2ImgError
from text2img.telemetry.terminal import discard_output, flush_errors, prepare_streams, print_error

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from text2img.settings import Option

_EVERYTHING = (
    *(
        "database",
        "output",
        "callback",
        "input",
        "prompts",
        "selection",
        "model",
        "generator",
        "generation",
        "image",
    ),
    *("evaluation", "run", "metrics"),
    "logging",
)
_QUEUE = ("database", "logging")
_OPERANDS = {"verify": "[FILE …] ", "enqueue": "FILE ", "compare": "RUN_A RUN_B "}


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its module, its line in the help, and the groups of options that it takes."""

    module: str
    meaning: str
    groups: tuple[str, ...]
    environment: bool = True


COMMANDS = {
    "run": Command(
        "run",
        "claim pending prompts, generate, store, record, notify, exit",
        (*_EVERYTHING, "distributed"),
    ),
    "serve": Command("serve", "run until stopped, and wait for new prompts", (*_EVERYTHING, "serving")),
    "demo": Command(
        "demo", "run with built-in parts: no server, no GPU, no download", ("model", "logging"), False
    ),
    "enqueue": Command(
        "enqueue", "add prompts from a .json, .jsonl, .yaml, .csv or .txt file", (*_QUEUE, "prompts")
    ),
    "schema": Command("schema", "print the JSON Schema of a file of prompts", ("logging",), False),
    "status": Command(
        "status", "show counts of prompts by status, and the last runs", (*_QUEUE, "selection")
    ),
    "compare": Command(
        "compare", "compare two runs over the same prompts", ("database", "output", "logging")
    ),
    "retry": Command("retry", "reset failed prompts to pending", (*_QUEUE, "selection")),
    "report": Command(
        "report", "write an HTML page of images and failures", (*_QUEUE, "output", "selection")
    ),
    "verify": Command("verify", "check what images say of their making", (*_QUEUE, "output", "verification")),
    "doctor": Command(
        "doctor", "check every dependency and report problems", (*_EVERYTHING, "serving", "distributed")
    ),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and never repeat a value, which might be a secret."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (by default the process's arguments), and return the exit status."""
    prepare_streams()
    try:
        return _answer(sys.argv[1:] if argv is None else list(argv))
    finally:
        flush_errors()


def _answer(argv: list[str]) -> int:
    """Run the command; print what ended it if logging is not set up yet; return the exit status."""
    try:
        arguments = _parse(argv)
        status = _run(arguments)
        sys.stdout.flush()  # a write error at interpreter exit could not be reported
    except Text2ImgError as exc:
        first, *more = exc.lines
        print_error(f"text2img: {first}", *more)
        return exc.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python would report that again when it flushes at exit.
        discard_output()
        return 141
    except OSError as exc:
        discard_output()
        print_error(f"text2img: standard output cannot be written: {exc.strerror}")
        return 1
    return status


def _output_is_closed() -> bool:
    """Return True if standard output has no reader; else a connection of the command itself broke."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _run(arguments: argparse.Namespace) -> int:
    """Load the settings, set up logging, and run the command; log a failure as one masked line."""
    from text2img.settings.loader import load

    command = COMMANDS[arguments.command]
    names = {option.name for option in _options(command.groups)}
    flags = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    settings = load(flags, environment=command.environment)
    from text2img.concurrency.signals import exit_on_signal
    from text2img.telemetry.logs import Mask, report_failure, set_up
    from text2img.telemetry.tracing import secrets
    from text2img.worker.job import current_task, mark_logs

    mask = Mask([*settings.secrets, *_database_urls(arguments), *secrets(os.environ)])
    progress = set_up(settings, mask)
    mark_logs(current_task())
    try:
        with exit_on_signal():
            module = import_module(f"text2img.cli.{command.module}")
            status: int = module.main(settings, arguments, progress)
    except BrokenPipeError as exc:
        if _output_is_closed():
            raise
        return report_failure(exc)
    except Exception as exc:  # noqa: BLE001 - every failure ends in one line and the right status
        return report_failure(exc)
    return status


def _database_urls(arguments: argparse.Namespace) -> list[str]:
    """Return the databases' URLs among the operands, which may contain passwords."""
    runs = (getattr(arguments, name, "").rpartition("#") for name in ("run_a", "run_b"))
    return [url for before, _, after in runs if "://" in (url := before or after)]


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments with the command's parser; the default command is ``run``."""
    if not argv or (argv[0].startswith("-") and argv[0] not in {"-h", "--help", "--version"}):
        argv = ["run", *argv]
    argv = [_normalized(word) for word in argv]
    if argv[0] in COMMANDS:
        namespace = argparse.Namespace(command=argv[0])
        arguments, unknown = _command_parser(argv[0]).parse_known_args(argv[1:], namespace)
        if unknown:
            raise ConfigurationError(_unknown_message(unknown, argv[0]))
        return arguments
    _top_parser().parse_args(argv[:1])
    raise ConfigurationError(f"unknown command {argv[0]!r}; use one of {', '.join(COMMANDS)}")


def _normalized(word: str) -> str:
    """Return a flag with dashes: ``--mongo_uri`` is accepted for ``--mongo-uri``."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _unknown_message(words: Sequence[str], command: str) -> str:
    """Return the error message for unknown arguments; it omits values, which may be passwords."""
    from text2img.prompts.parameters import nearest

    word = words[0].partition("=")[0]
    if not word.startswith("-"):
        return f"{command} takes no further arguments, but got {len(words)}; see text2img {command} --help"
    flags = [option.flag for option in _options(COMMANDS[command].groups)]
    return f"{command} has no option {word}{nearest(word, flags)}; see text2img {command} --help"


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.meaning}" for name, command in COMMANDS.items()]
    parser = _Parser(
        prog="text2img",
        usage="text2img [COMMAND] [flags]",
        description="Generate images for the prompts in a database; store them in a bucket or a folder.",
        epilog="commands (default: run):\n" + "\n".join(lines) + "\n\n"
        "text2img COMMAND --help lists a command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"text2img {__version__}")
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    return parser


def _command_parser(name: str) -> argparse.ArgumentParser:
    command = COMMANDS[name]
    parser = _Parser(
        prog=f"text2img {name}",
        description=command.meaning[:1].upper() + command.meaning[1:] + ".",
        usage=f"text2img {name} {_OPERANDS.get(name, '')}[flags]",
        allow_abbrev=False,
    )
    if name == "run":
        parser.add_argument(
            "--dry-run", action="store_true", help="print the planned batches and write nothing"
        )
    if name == "demo":
        parser.add_argument("--output", dest="folder", default="text2img-demo", help="the demo's folder")
        parser.add_argument("--fresh", action="store_true", help="remove the last demo's files first")
    if name == "enqueue":
        parser.add_argument("file", metavar="FILE", help="file of prompts; - is standard input")
        formats = "json, jsonl, yaml, csv or txt; by default the file's name or the content tells"
        parser.add_argument("--format", metavar="FORMAT", help=formats)
    if name == "status":
        parser.add_argument(
            "--plot", metavar="RUN", help="plot a run's time by stage; last means the latest run"
        )
        parser.add_argument("--plot-file", metavar="FILE", help="write that plot to a PNG file")
        watch = "repeat every SECONDS (default 2) until stopped, with speed and workers"
        parser.add_argument("--watch", nargs="?", const="2", metavar="SECONDS", help=watch)
    if name == "report":
        parser.add_argument("--html", metavar="FILE", default="report.html", help="file to write")
        parser.add_argument("--run-id", metavar="RUN", help="only the images and failures of this run")
    if name == "verify":
        parser.add_argument(
            "files", metavar="FILE", nargs="*", help="image; a URL is of the output's storage"
        )
        parser.add_argument("--run-id", metavar="RUN", help="the images that the database lists for this run")
        parser.add_argument("--json", action="store_true", help="print one JSON document for programs")
    if name == "compare":
        _compare_arguments(parser)
    if name == "retry":
        parser.add_argument("--error-code", help="only prompts that failed with this code")
        callbacks = "reopen the notifications that were rejected, in place of the prompts"
        parser.add_argument("--callbacks", action="store_true", help=callbacks)
    group = parser.add_argument_group
    sections = {section: group(section) for section in command.groups}
    for option in _options(command.groups):
        text = f"{option.meaning} [{option.variable}; default: {option.default_shown}]".replace("%", "%%")
        extra: dict[str, Any] = {"nargs": "?", "const": "true"} if option.switch else {}
        sections[option.group].add_argument(option.flag, dest=option.name, metavar="…", help=text, **extra)
    return parser


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    run = "a run's id; or a folder with text2img.db, or a database's URL, optionally followed by #RUN_ID"
    parser.add_argument("run_a", metavar="RUN_A", help=run)
    parser.add_argument("run_b", metavar="RUN_B", help="as RUN_A")
    parser.add_argument("--json", metavar="FILE", help="write the whole comparison as JSON; - is stdout")
    parser.add_argument("--html", metavar="FILE", help="write a page with the images")
    parser.add_argument("--clip", metavar="MODEL", help="CLIP model (folder or hub id) for image similarity")


def _options(groups: tuple[str, ...]) -> Iterable[Option]:
    from text2img.settings import options

    return [option for option in options() if option.group in groups]
