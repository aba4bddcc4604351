"""The command line: how it is started and stopped, its help, its suggestions, its completion scripts."""

from __future__ import annotations

import ast
import json
import re
import shutil
import signal
import subprocess
import sys

import pytest

from tests.acceptance import product
from text2img import cli

USUAL = [
    *("--mongo-uri", "--database", "--gcs-bucket", "--output", "--output-dir"),
    *("--input-file", "--model-id", "--limit", "--batch-size", "--callback-url"),
]
DATABASE = ("--database", "sqlite:///prompts.db")
FOLDER = ("--output-dir", "o")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """A function that returns the finished process of a command line, one of those below."""
    lines = [
        *(("help",), ("--help",), ("help", "run"), ("run", "--help"), ("help", "help"), ("help", "statsu")),
        *(("statsu",), ("Status",), ("enqeue", "x"), ("status", "--watchh"), ("run", "--dry_rn")),
        *(
            ("retry", "--error-coed", "x"),
            ("status", "--batch-size", "3"),
            ("--log-level", "debug", "status"),
        ),
        *((("help", name)) for name in cli.COMMANDS),
        *(("completion", shell) for shell in ("bash", "zsh", "fish", "tcsh")),
        ("run", *FOLDER, "--log-file", "logs/a/generation.log", "--log-level", "warn"),
        ("run", *FOLDER, "--log-file", "~/logs/run.log", "--log-level", "Info"),
        ("run", *FOLDER, "--log-level", "loud"),
    ]
    folder = tmp_path_factory.mktemp("outcome")
    done = {
        each.args: (folder / str(number), each) for number, each in enumerate(product.run_each(lines, folder))
    }
    return lambda *line: done[line]


def test_help_is_a_command(outcome) -> None:
    """``help`` is ``--help``, ``help COMMAND`` is ``COMMAND --help``; status 0."""
    for command, flag in ((("help",), ("--help",)), (("help", "run"), ("run", "--help"))):
        (_, one), (_, other) = outcome(*command), outcome(*flag)
        assert one.returncode == 0
        assert one.stdout == other.stdout != ""
    assert outcome("help", "help")[1].stdout == outcome("help")[1].stdout


@pytest.mark.parametrize("line", [("help",), ("help", "run")], ids=" ".join)
def test_the_usual_options_come_first(outcome, line) -> None:
    """The ten that are set most are the first flags of the help, before all others."""
    listed = re.findall(r"^  (?:-h, )?(--[\w-]+)", outcome(*line)[1].stdout, re.MULTILINE)
    assert listed[:10] == USUAL


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_says_what_each_value_is(outcome, name) -> None:
    """Every flag that takes a value has a noun, N or its choices for it."""
    help_text = outcome("help", name)[1].stdout
    values = re.findall(r"^  (--[\w-]+) (?! )(\S+)", help_text, re.MULTILINE)
    assert all(re.fullmatch(r"[A-Z]+|\[?[\w|:-]+\]?|\[?[A-Z]+\]?", value) for _, value in values), values
    assert "…  " not in help_text
    if name == "run":
        named = dict(values)
        assert (named["--mongo-uri"], named["--batch-size"], named["--output-dir"]) == ("URI", "N", "FOLDER")
        assert (named["--dtype"], named["--guidance-scale"]) == ("auto|fp16|bf16|fp32", "X")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (("statsu",), "did you mean status?"),
        (("Status",), "did you mean status?"),
        (("enqeue", "x"), "did you mean enqueue?"),
        (("help", "statsu"), "did you mean status?"),
        (("status", "--watchh"), "did you mean --watch?"),
        (("run", "--dry_rn"), "did you mean --dry-run?"),
        (("retry", "--error-coed", "x"), "did you mean --error-code?"),
        (("status", "--batch-size", "3"), "it is an option of run, serve, doctor"),
        (("--log-level", "debug", "status"), "the command comes first: text2img status"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_misspelt_word_gets_a_suggestion(outcome, line, hint) -> None:
    """One line with the command or flag that was probably meant, status 2."""
    done = outcome(*line)[1]
    assert (done.returncode, done.stdout) == (2, "")
    (error,) = product.errors(done)
    assert hint in error


def test_the_log_file_s_folder_is_made(outcome) -> None:
    """Also the folders above it, and below the home directory; the level is taken in any case."""
    line = ("run", *FOLDER, "--log-file", "logs/a/generation.log", "--log-level", "warn")
    folder, done = outcome(*line)
    assert done.returncode == 0, done.stderr
    assert (folder / "logs" / "a" / "generation.log").read_text() == done.stderr == ""
    folder, done = outcome("run", *FOLDER, "--log-file", "~/logs/run.log", "--log-level", "Info")
    assert "prompts waiting: 0" in (folder / "logs" / "run.log").read_text()
    assert not (folder / "~").exists()
    wrong = outcome("run", *FOLDER, "--log-level", "loud")[1]
    assert wrong.returncode == 2
    assert "'loud'" in wrong.stderr


def test_completion_scripts_name_commands_and_flags(outcome) -> None:
    """Each shell's script has every command, flags and choices; another shell is refused."""
    for shell in ("bash", "zsh", "fish"):
        done = outcome("completion", shell)[1]
        assert done.returncode == 0, done.stderr
        assert all(name in done.stdout for name in cli.COMMANDS)
        for word in ("output-dir", "dry-run", "bf16"):
            assert word in done.stdout
    assert outcome("completion", "tcsh")[1].returncode == 2


def test_bash_completes_a_line(outcome, tmp_path) -> None:
    """Bash takes the script, and completes a command, a flag with and without a command, and a choice."""
    (tmp_path / "script").write_text(outcome("completion", "bash")[1].stdout)
    lines = ["text2img stat", "text2img status --wat", "text2img --mongo", "text2img run --dtype bf"]
    ask = "; ".join(
        f"COMP_WORDS=({line}); COMP_CWORD={len(line.split()) - 1}; COMPREPLY=(); _shtab_text2img;"
        ' echo "${COMPREPLY[*]}"'
        for line in lines
    )
    done = subprocess.run(
        [shutil.which("bash"), "-c", f". ./script; {ask}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["status", "--watch", "--mongo-uri", "bf16"], done.stderr


def test_the_package_is_a_program(tmp_path) -> None:
    """``python -m text2img`` is the command line, with its status; neither imports what is heavy."""
    words = [sys.executable, "-X", "importtime", "-m", "text2img", "completion", "fish"]
    environment = product.environment(tmp_path, PYTHONPATH=str(product.ROOT))
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "text2img.cli" in imported
    assert not imported & {"torch", "pydantic", "numpy", "rich", "requests", "pymongo", "PIL"}
    wrong = subprocess.run(
        [*words[:1], "-m", "text2img", "statsu"], cwd=tmp_path, env=environment, check=False
    )
    assert wrong.returncode == 2


@pytest.mark.parametrize("start", [["main.py"], ["-m", "text2img"]], ids=["main.py", "module"])
def test_an_older_python_gets_one_sentence(start, tmp_path) -> None:
    """What runs before the check has the syntax and the modules of old Pythons."""
    pretend = (
        "import runpy, sys; sys.version_info = (3, 10, 4, 'final', 0); sys.path.insert(0, sys.argv.pop(1)); "
    )
    run = "runpy.run_path('{0}/main.py', run_name='__main__')" if start == ["main.py"] else (
        "runpy.run_module('text2img', run_name='__main__')"
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", pretend + run.format(product.ROOT), str(product.ROOT)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "text2img needs Python 3.11 or newer; this is Python 3.10\n"
    for name in ("main.py", "text2img/__init__.py", "text2img/__main__.py"):
        ast.parse((product.ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 7))


SLOW = """
import builtins, sys, time
imported = builtins.__import__
def slow(name, *rest, **named):
    if name == {name!r} and not hasattr(sys, "stopped_at"):
        sys.stopped_at = name
        print("now", flush=True)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            pass
    return imported(name, *rest, **named)
builtins.__import__ = slow
import atexit
if {name!r} == "the end":
    def wait():
        print("now", flush=True)
        time.sleep(60)
    atexit.register(wait)
"""


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("text2img", signal.SIGINT),
        ("argparse", signal.SIGTERM),
        ("text2img.cli", signal.SIGINT),
        ("text2img.settings.loader", signal.SIGINT),
        ("text2img.settings.loader", signal.SIGTERM),
        ("text2img.databases.documents", signal.SIGINT),
        ("text2img.databases.documents", signal.SIGTERM),
        ("the end", signal.SIGINT),
        ("the end", signal.SIGTERM),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_signal_ends_the_command_wherever_it_is(tmp_path, place, number) -> None:
    """In an import of ours before and after the settings are read, or at the end: its status and one line."""
    product.add(tmp_path, "a cat")
    (tmp_path / "sitecustomize.py").write_text(SLOW.format(name=place))
    words = ("status", *DATABASE)
    with product.running(*words, folder=tmp_path, PYTHONPATH=str(tmp_path)) as process:
        while process.stdout.readline() != "now\n":
            assert process.poll() is None
        process.send_signal(number)
        _, errors = process.communicate(timeout=product.HANG)
    assert process.returncode == 128 + number, errors
    assert errors == f"text2img: stopped by signal {number:d}\n"


def test_a_stopped_run_leaves_its_summary_and_contact_sheet(tmp_path) -> None:
    """Ctrl-C while the second of two prompts is on the device: what is done is in both files."""
    (tmp_path / "prompts.jsonl").write_text(
        '{"text": "a cat", "priority": 1}\n{"text": "hold"}\n', encoding="utf-8"
    )
    words = ("run", "--input-file", "prompts.jsonl", "--output-dir", "outputs", "--batch-size", "1")
    with product.sleeping.running(*words, folder=tmp_path) as process:
        while '"event": "prompt"' not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=product.HANG)
    assert process.returncode == 130
    assert output.startswith("completed 1, failed 0, remaining 1")
    summary = json.loads((tmp_path / "outputs" / "summary.json").read_text())
    assert (summary["status"], summary["completed"]) == ("stopped", 1)
    assert (tmp_path / "outputs" / "contact-sheet.png").read_bytes().startswith(b"\x89PNG")
