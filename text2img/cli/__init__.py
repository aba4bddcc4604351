"""The command line: commands and flags → Settings → a command → the exit status.

This module holds only the parser, so that ``--help`` and a wrong flag are answered before anything heavy is
imported. Each command is a module of its own, imported on demand.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NoReturn, get_args, get_type_hints

from text2img import __version__
from text2img.errors import ConfigurationError, RunFailed, Text2ImgError
from text2img.telemetry.terminal import (
    choose_output,
    discard_output,
    flush_errors,
    prepare_streams,
    print_document,
    print_error,
    print_result,
)

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
    *("evaluation", "loop", "run", "metrics"),
    "logging",
)
_QUEUE = ("database", "logging")
_OPERANDS = {
    "enqueue": "FILE ",
    "compare": "RUN_A RUN_B ",
    "verify": "[FILE …] ",
    "help": "[COMMAND] ",
    "completion": "SHELL ",
}
_USUAL: Final = (
    *("mongo_uri", "database", "gcs_bucket", "output", "output_dir"),
    *("input_file", "model_id", "limit", "batch_size", "callback_url"),
)
"""The options that are set most; the help lists them first."""
_LIBRARIES_SECRETS: Final = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN")
_SHELLS: Final = ("bash", "zsh", "fish")


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its module, its line in the help, and the groups of options that it takes.

    ``json``: with the flag of that name, its result is one JSON document.
    """

    module: str
    meaning: str
    groups: tuple[str, ...]
    environment: bool = True
    json: bool = False


COMMANDS = {
    "run": Command(
        "run",
        "claim pending prompts, generate, store, record, notify, exit",
        (*_EVERYTHING, "distributed"),
        json=True,
    ),
    "serve": Command("serve", "run until stopped, and wait for new prompts", (*_EVERYTHING, "serving")),
    "demo": Command(
        "demo", "run with built-in parts: no server, no GPU, no download", ("model", "logging"), False
    ),
    "enqueue": Command(
        "enqueue",
        "add prompts from a .json, .jsonl, .yaml, .csv or .txt file",
        (*_QUEUE, "prompts"),
        json=True,
    ),
    "schema": Command("schema", "print the JSON Schema of a file of prompts", ("logging",), False),
    "status": Command(
        "status", "show counts of prompts by status, and the last runs", (*_QUEUE, "selection"), json=True
    ),
    "compare": Command(
        "compare", "compare two runs over the same prompts", ("database", "output", "logging")
    ),
    "retry": Command(
        "retry",
        "reset failed prompts to pending",
        (*_QUEUE, "selection", "output", "evaluation"),
        json=True,
    ),
    "report": Command(
        "report", "write an HTML page of images and failures", (*_QUEUE, "output", "selection")
    ),
    "verify": Command(
        "verify", "check how images are marked", (*_QUEUE, "output", "verification"), json=True
    ),
    "doctor": Command(
        "doctor",
        "check every dependency and report problems",
        (*_EVERYTHING, "serving", "distributed"),
        json=True,
    ),
    "help": Command("", "show this help, or a command's", (), False),
    "completion": Command(
        "", "print a script that completes commands and flags: bash, zsh or fish", (), False
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
    choose_output(json=_asks_for_json(argv))
    try:
        arguments = _parse(argv)
        status = _run(arguments) if COMMANDS[arguments.command].module else _complete(arguments.shell)
        sys.stdout.flush()  # a write error at interpreter exit could not be reported
    except Text2ImgError as exc:
        first, *more = exc.lines
        print_error(f"text2img: {first}", *more)
        return _print_failure(str(exc), exc.exit_status)
    except KeyboardInterrupt:
        return _print_stop(130)
    except SystemExit as exc:
        if isinstance(exc.code, int) and exc.code > 128:
            return _print_stop(exc.code)
        raise
    except BrokenPipeError:
        # The reader of our output has gone; Python would report that again when it flushes at exit.
        discard_output()
        return 141
    except OSError as exc:
        discard_output()
        print_error(f"text2img: standard output cannot be written: {exc.strerror}")
        return 1
    return status


def _asks_for_json(argv: Sequence[str]) -> bool:
    """Return True if ``--json`` is on the command line as a flag; that of ``compare`` names a file."""
    return "compare" not in argv[:1] and any(word.partition("=")[0] == "--json" for word in argv)


def _print_failure(message: str, status: int) -> int:
    """Print a failure's document, if the output is JSON; return the exit status."""
    with suppress(OSError, RunFailed):  # the status is returned all the same
        print_result({"error": message, "status": status})
    return status


def _print_stop(status: int) -> int:
    message = f"stopped by signal {status - 128}"
    print_error(f"text2img: {message}")
    return _print_failure(message, status)


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
    notes: list[str] = []
    settings = load(flags, environment=command.environment, notes=notes)
    import logging

    from text2img.concurrency.signals import exit_on_signal
    from text2img.telemetry.logs import Mask, failure_message, report_failure, set_up
    from text2img.telemetry.tracing import secrets
    from text2img.worker.job import current_task, mark_logs

    keys = [os.environ.get(name, "") for name in _LIBRARIES_SECRETS]
    mask = Mask([*settings.secrets, *_database_urls(arguments), *secrets(os.environ), *keys])
    progress = set_up(settings, mask)
    mark_logs(current_task())
    for note in notes:
        logging.getLogger("text2img.settings").warning("%s", note)
    try:
        with exit_on_signal():
            module = import_module(f"text2img.cli.{command.module}")
            status: int = module.main(settings, arguments, progress)
    except BrokenPipeError as exc:
        if _output_is_closed():
            raise
        return _print_failure(mask(failure_message(exc)), report_failure(exc))
    except Exception as exc:  # noqa: BLE001 - every failure ends in one line and the right status
        return _print_failure(mask(failure_message(exc)), report_failure(exc))
    return status


def _complete(shell: str) -> int:
    """Print the shell's completion script, which names every command and flag; return the exit status."""
    import shtab

    top = _Parser(prog="text2img")
    _add_arguments(top, "run")  # without a command it is run
    commands = top.add_subparsers()
    for name, command in COMMANDS.items():
        parser = commands.add_parser(name, help=command.meaning)
        _add_arguments(parser, name)
    for parser in (top, *commands.choices.values()):
        for action in parser._actions:  # noqa: SLF001 - argparse has no public list of them
            if action.metavar in {"FILE", "FOLDER"}:
                # shtab reads this attribute, which argparse does not have.
                vars(action)["complete"] = shtab.FILE if action.metavar == "FILE" else shtab.DIRECTORY
            elif isinstance(action.metavar, str) and "|" in action.metavar and action.nargs is None:
                action.choices = action.metavar.split("|")
    print_document(shtab.complete(top, shell))
    return 0


def _database_urls(arguments: argparse.Namespace) -> list[str]:
    """Return the databases' URLs among the operands, which may contain passwords."""
    runs = (getattr(arguments, name, "").rpartition("#") for name in ("run_a", "run_b"))
    return [url for before, _, after in runs if "://" in (url := before or after)]


def _parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments with the command's parser; the default command is ``run``."""
    if not argv or (argv[0].startswith("-") and argv[0] not in {"-h", "--help", "--version"}):
        argv = ["run", *argv]
    argv = [_normalized(word) for word in argv]
    if argv[0] == "help":
        argv = [*(word for word in argv[1:2] if word != "help"), "--help"]
    if argv[0] in COMMANDS:
        namespace = argparse.Namespace(command=argv[0])
        parser = _command_parser(argv[0])
        arguments, unknown = parser.parse_known_args(argv[1:], namespace)
        if unknown:
            raise ConfigurationError(_unknown_message(unknown, argv[0], parser))
        return arguments
    _top_parser().parse_args(argv[:1])
    from text2img.prompts.parameters import nearest

    hint = nearest(argv[0], list(COMMANDS)) or f"; use one of {', '.join(COMMANDS)}"
    raise ConfigurationError(f"unknown command {argv[0]!r}{hint}")


def _normalized(word: str) -> str:
    """Return a flag with dashes: ``--mongo_uri`` is accepted for ``--mongo-uri``."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _unknown_message(words: Sequence[str], command: str, parser: argparse.ArgumentParser) -> str:
    """Return the error message for unknown arguments; it omits values, which may be passwords."""
    from text2img.prompts.parameters import nearest

    word, see = words[0].partition("=")[0], f"; see text2img {command} --help"
    if word in COMMANDS:
        return f"the command comes first: text2img {word} [flags]"
    if not word.startswith("-"):
        return f"{command} takes no further arguments, but got {len(words)}{see}"
    flags = list(parser._option_string_actions)  # noqa: SLF001 - argparse has no public list of them
    others = [
        name
        for name, other in COMMANDS.items()
        if any(option.flag == word for option in _options(other.groups))
    ]
    hint = f"; it is an option of {', '.join(others)}" if others else nearest(word, flags)
    return f"{command} has no option {word}{hint}{see}"


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.meaning}" for name, command in COMMANDS.items()]
    parser = _Parser(
        prog="text2img",
        usage="text2img [COMMAND] [flags]",
        description="Generate images for the prompts in a database; store them in a bucket or a folder.",
        epilog="commands (default: run):\n" + "\n".join(lines) + "\n\n"
        "text2img COMMAND --help, or text2img help COMMAND, lists a command's flags.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", nargs="?", help=argparse.SUPPRESS)
    _add_options(parser, [option for option in _options(COMMANDS["run"].groups) if option.name in _USUAL])
    parser.add_argument("--version", action="version", version=f"text2img {__version__}")
    _list_own_flags_last(parser)
    return parser


def _command_parser(name: str) -> argparse.ArgumentParser:
    command = COMMANDS[name]
    parser = _Parser(
        prog=f"text2img {name}",
        description=command.meaning[:1].upper() + command.meaning[1:] + ".",
        usage=f"text2img {name} {_OPERANDS.get(name, '')}[flags]",
        allow_abbrev=False,
    )
    _add_arguments(parser, name)
    return parser


_OWN_ARGUMENTS: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "run": {"--dry-run": {"action": "store_true", "help": "print the planned batches and write nothing"}},
    "demo": {
        "--output": {
            "dest": "folder",
            "metavar": "FOLDER",
            "default": "text2img-demo",
            "help": "the demo's folder",
        },
        "--fresh": {"action": "store_true", "help": "remove the last demo's files first"},
    },
    "enqueue": {
        "file": {"metavar": "FILE", "help": "file of prompts; - is standard input"},
        "--format": {
            "metavar": "FORMAT",
            "help": "json, jsonl, yaml, csv or txt; by default by the file's name or content",
        },
    },
    "status": {
        "--plot": {"metavar": "RUN", "help": "plot a run's time by stage; last means the latest run"},
        "--plot-file": {"metavar": "FILE", "help": "file for it: .png, .svg, .pdf or .txt"},
        "--watch": {
            "nargs": "?",
            "const": "2",
            "metavar": "SECONDS",
            "help": "repeat every SECONDS (default 2) until stopped, with speed and workers",
        },
    },
    "report": {
        "--html": {"metavar": "FILE", "default": "report.html", "help": "file to write"},
        "--run-id": {"metavar": "RUN", "help": "only the images and failures of this run"},
    },
    "verify": {
        "files": {"metavar": "FILE", "nargs": "*", "help": "image; a URL is of the output's storage"},
        "--run-id": {"metavar": "RUN", "help": "the images that the database lists for this run"},
    },
    "retry": {
        "--error-code": {"metavar": "CODE", "help": "only prompts that failed with this code"},
        "--callbacks": {
            "action": "store_true",
            "help": "reopen the notifications that were rejected, in place of the prompts",
        },
        "--unscored": {
            "action": "store_true",
            "help": "score the stored images that have no score, in place of the prompts",
        },
    },
    "completion": {"shell": {"metavar": "SHELL", "choices": _SHELLS, "help": f"one of {', '.join(_SHELLS)}"}},
}
"""What a command takes beside the options, by its name or flag; compare adds its own."""


def _add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the command's operands and flags: the help lists the usual options first, its own flags last."""
    command = COMMANDS[name]
    for word, settings in _OWN_ARGUMENTS.get(name, {}).items():
        parser.add_argument(word, **settings)
    if name == "compare":
        _compare_arguments(parser)
    if command.json:
        parser.add_argument("--json", action="store_true", help="print one JSON document for programs")
    _add_options(parser, _options(command.groups))
    _list_own_flags_last(parser)


def _list_own_flags_last(parser: argparse.ArgumentParser) -> None:
    groups = parser._action_groups  # noqa: SLF001 - argparse lists its own groups first
    groups.append(groups.pop(1))


def _add_options(parser: argparse.ArgumentParser, listed: Iterable[Option]) -> None:
    """Add options to the parser: the usual ones in their order, then the others by group."""
    from text2img.settings import Settings

    hints = get_type_hints(Settings, include_extras=True)
    sections: dict[str, argparse._ArgumentGroup] = {}
    usual = {name: index for index, name in enumerate(_USUAL)}
    for option in sorted(listed, key=lambda option: usual.get(option.name, len(usual))):
        title = "usual options" if option.name in usual else option.group
        if title not in sections:
            sections[title] = parser.add_argument_group(title)
        text = f"{option.meaning} [{option.variable}; default: {option.default_shown}]".replace("%", "%%")
        extra: dict[str, Any] = {"nargs": "?", "const": "true"} if option.switch else {}
        metavar = _metavar(option, hints[option.name])
        sections[title].add_argument(option.flag, dest=option.name, metavar=metavar, help=text, **extra)


_METAVARS: Final = {
    "URL": "database pushgateway endpoint",
    "FOLDER": "dir cache",
    "FILE": "file textfile font",
    "MODEL": "autoencoder",
    "NAME": "collection queue evaluator",
    "SECONDS": "seconds patience timeout exit",
    "URL|FOLDER": "output",
    "TEXT": "prompt",
    "N": "size feature_cache",
    "GB": "lora_cache_size",
    "W:H": "ratio",
    "X": "score",
    "DOLLARS": "price",
    "local|fal:MODEL": "generator",
}
"""The placeholder of an option's value in the help, with the names of such options or their last words."""


def _metavar(option: Option, annotation: object) -> str:
    """Return the placeholder of the option's value in the help: its choices, N, or a noun such as FOLDER."""
    word = option.name.rpartition("_")[2]
    for known in (option.name, word):
        for metavar, names in _METAVARS.items():
            if known in names.split():
                return metavar
    if option.switch:
        return "yes|no"
    leaves = list(_leaves(annotation))
    number = ["N"] if int in leaves else ["X"] if float in leaves else []
    choices = "|".join([*number, *(leaf for leaf in leaves if isinstance(leaf, str))])
    return choices if 0 < len(choices) <= 40 else word.upper()


def _leaves(annotation: object) -> Iterable[object]:
    """Yield the types and the choices in an annotation of an option."""
    parts = get_args(annotation)
    if not parts:
        yield annotation
    for part in parts:
        yield from _leaves(part)


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
