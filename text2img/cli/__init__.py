"""The command line: commands and flags → Settings → a command → the exit status.

Only the parser lives here, so that ``--help`` and a wrong flag are answered before anything heavy is
imported; each command is a module of its own, imported when it is asked for.
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

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from text2img.settings import Option

_EVERYTHING = (
    *("database", "output", "callback", "input", "selection", "model", "generator", "generation", "picture"),
    *("evaluation", "run", "metrics"),
    "logging",
)
_QUEUE = ("database", "logging")
_OPERANDS = {"enqueue": "FILE ", "compare": "RUN_A RUN_B "}


@dataclass(frozen=True, slots=True)
class Command:
    """A command: the module that holds it, its line in the help, and the groups of options it takes."""

    module: str
    meaning: str
    groups: tuple[str, ...]
    environment: bool = True


COMMANDS = {
    "run": Command(
        "run", "claim what is pending, generate, store, record, notify, exit", (*_EVERYTHING, "distributed")
    ),
    "serve": Command("serve", "the same without an end: work until stopped", (*_EVERYTHING, "serving")),
    "demo": Command(
        "demo", "the same job on built-in parts: no server, no GPU, no download", ("model", "logging"), False
    ),
    "enqueue": Command("enqueue", "add prompts from a .json, .jsonl, .yaml, .csv or .txt file", _QUEUE),
    "schema": Command("schema", "print the JSON Schema of a file of prompts", ("logging",), False),
    "status": Command("status", "show what waits, what is worked on, the last runs", (*_QUEUE, "selection")),
    "compare": Command(
        "compare", "compare two runs over the same prompts", ("database", "output", "logging")
    ),
    "retry": Command("retry", "put failed prompts back to pending", (*_QUEUE, "selection")),
    "report": Command(
        "report", "write an HTML page of what was made and what failed", (*_QUEUE, "output", "selection")
    ),
    "doctor": Command(
        "doctor", "try every dependency and say what is wrong", (*_EVERYTHING, "serving", "distributed")
    ),
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and never repeat a value, which might be a secret."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (by default the process's arguments) asks for; the exit status."""
    try:
        arguments = _parse(sys.argv[1:] if argv is None else list(argv))
        status = _run(arguments)
        sys.stdout.flush()  # else what cannot be written is found out when nobody can say so any more
    except Text2ImgError as exc:
        print(f"text2img: {exc}", file=sys.stderr)
        return exc.exit_status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes at exit.
        _silence()
        return 141
    except OSError as exc:
        _silence()
        print(f"text2img: standard output cannot be written: {exc.strerror}", file=sys.stderr)
        return 1
    return status


def _silence() -> None:
    """What is left of our output goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unread() -> bool:
    """Whether our output has no reader any more; else a connection of the command's own broke."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _run(arguments: argparse.Namespace) -> int:
    """Read the settings, set up logging, and let the command work; its failures end in one masked line."""
    from text2img.settings.loader import load

    command = COMMANDS[arguments.command]
    names = {option.name for option in _options(command.groups)}
    flags = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    settings = load(flags, environment=command.environment)
    from text2img.concurrency.signals import exit_on_signal
    from text2img.telemetry.logs import Mask, report_failure, set_up
    from text2img.telemetry.tracing import secrets
    from text2img.worker import platform_task

    mask = Mask([*settings.secrets, *_databases(arguments), *secrets(os.environ)])
    progress = set_up(settings, mask)
    platform_task.mark_logs(platform_task.find())
    try:
        with exit_on_signal():
            module = import_module(f"text2img.cli.{command.module}")
            status: int = module.main(settings, arguments, progress)
    except BrokenPipeError as exc:
        if _unread():
            raise
        return report_failure(exc)
    except Exception as exc:  # noqa: BLE001 - whatever it is ends in one line and the right status
        return report_failure(exc)
    return status


def _databases(arguments: argparse.Namespace) -> list[str]:
    """The databases' URLs among the operands, which may hold passwords."""
    runs = (getattr(arguments, name, "").rpartition("#") for name in ("run_a", "run_b"))
    return [url for before, _, behind in runs if "://" in (url := before or behind)]


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments as the command that takes them sees them; without a command it is ``run``."""
    if not argv or (argv[0].startswith("-") and argv[0] not in {"-h", "--help", "--version"}):
        argv = ["run", *argv]
    argv = [_dashes(word) for word in argv]
    if argv[0] in COMMANDS:
        arguments, unknown = _command_parser(argv[0]).parse_known_args(argv[1:], _named(argv[0]))
        if unknown:
            raise ConfigurationError(_unknown(unknown, argv[0]))
        return arguments
    _top_parser().parse_args(argv[:1])
    raise ConfigurationError(f"there is no command {argv[0]!r}; there are {', '.join(COMMANDS)}")


def _named(command: str) -> argparse.Namespace:
    return argparse.Namespace(command=command)


def _dashes(word: str) -> str:
    """Flags are taken in both spellings: ``--mongo_uri`` is ``--mongo-uri``."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _unknown(words: Sequence[str], command: str) -> str:
    """What was not understood, by name alone: the value beside it might be a password."""
    from text2img.prompts.validation import nearest

    word = words[0].partition("=")[0]
    if not word.startswith("-"):
        return f"{command} takes no further argument (there are {len(words)}); see {command} --help"
    flags = [option.flag for option in _options(COMMANDS[command].groups)]
    return f"{command} has no option {word}{nearest(word, flags)}; see text2img {command} --help"


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.meaning}" for name, command in COMMANDS.items()]
    parser = _Parser(
        prog="text2img",
        usage="text2img [COMMAND] [flags]",
        description="Prompts from a database → pictures by diffusers → pictures in a bucket or a folder.",
        epilog="commands (run, where none is given):\n" + "\n".join(lines) + "\n\n"
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
            "--dry-run", action="store_true", help="say what would be done, batch by batch; write nothing"
        )
    if name == "demo":
        parser.add_argument("--output", dest="folder", default="text2img-demo", help="the folder it works in")
        parser.add_argument("--fresh", action="store_true", help="remove the last demo's folder first")
    if name == "enqueue":
        parser.add_argument("file", metavar="FILE", help="the prompts; - is standard input")
    if name == "status":
        parser.add_argument(
            "--plot", metavar="RUN", help="plot where a run's time went; last: the latest one"
        )
        parser.add_argument("--plot-file", metavar="FILE", help="draw that plot into a PNG")
        watch = "show it again every so many seconds (2), with pace and workers, until stopped"
        parser.add_argument("--watch", nargs="?", const="2", metavar="SECONDS", help=watch)
    if name == "report":
        parser.add_argument("--html", metavar="FILE", default="report.html", help="the file it writes")
        parser.add_argument("--run-id", metavar="RUN", help="only what this run made, and what failed in it")
    if name == "compare":
        _compare_arguments(parser)
    if name == "retry":
        parser.add_argument("--error-code", help="only prompts that failed with this code")
    group = parser.add_argument_group
    sections = {section: group(section) for section in command.groups}
    for option in _options(command.groups):
        text = f"{option.meaning} [{option.variable}; default: {option.default_shown}]".replace("%", "%%")
        alone: dict[str, Any] = {"nargs": "?", "const": "true"} if option.switch else {}
        sections[option.group].add_argument(option.flag, dest=option.name, metavar="…", help=text, **alone)
    return parser


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    run = "a run's id; a folder that holds text2img.db, or a database's URL, either with #RUN_ID behind it"
    parser.add_argument("run_a", metavar="RUN_A", help=run)
    parser.add_argument("run_b", metavar="RUN_B", help="the same")
    parser.add_argument("--json", metavar="FILE", help="write all of it as JSON; - is standard output")
    parser.add_argument("--html", metavar="FILE", help="write a page with the pictures")
    parser.add_argument("--clip", metavar="MODEL", help="a CLIP model (folder or hub id) compares them too")


def _options(groups: tuple[str, ...]) -> Iterable[Option]:
    from text2img.settings import options

    return [option for option in options() if option.group in groups]
